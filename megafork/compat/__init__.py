"""Every patch of somebody else's code lives here, each with its reason, the versions it is for, and when it can go.

`tests/test_compat.py` shows for each patch that the unpatched library still fails; a test that no longer can means that the patch
can be deleted.
"""
