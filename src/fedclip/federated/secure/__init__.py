"""Secure aggregation: sums of updates that nobody sees one by one.

Bonawitz et al. 2017 (CCS, ePrint 2017/281), the variant for an active coordinator: pairwise and
self masks, secrets shared by Shamir's scheme, signed keys, and a list of survivors on which the
sites agree.
"""
