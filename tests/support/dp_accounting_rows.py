"""Epsilon by dp-accounting's PLD: reads rows [q, steps, delta, noise], for an environment apart."""

import json
import sys

import dp_accounting
from dp_accounting import pld

found = []
for q, steps, delta, noise in json.load(sys.stdin):
    event = dp_accounting.PoissonSampledDpEvent(q, dp_accounting.GaussianDpEvent(noise))
    found.append(pld.PLDAccountant().compose(event, steps).get_epsilon(delta))
print(json.dumps(found))
