"""Audits by attack: what a training betrays of who was in it, beside what is promised."""
