"""Pinned tasks: everything fixed, so that two agents are compared on the same thing.

`tasks` names them, `entries` has the plans that published methods choose on them, and
`evaluation` evaluates a policy beside those.
"""
