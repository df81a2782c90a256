"""What people are shown: the shapes of answers, and what builds them of what the layers below return.

HTTP and the command line answer with the same fields because both answer with these. No web framework is needed here:
routes, and the bodies that only requests have, are those of `proxy.edge`.
"""
