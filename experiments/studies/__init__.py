"""The published evidence: a study is a module here, or a package, with a `Study` in a module.

``python -m experiments.studies.NAME`` runs it. `experiments.study` says how it declares its
committed records and the pages that show them. Nothing imports a study.
"""
