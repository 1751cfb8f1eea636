"""The metaserver: names, chunk maps, sessions, membership. See docs/design.md section 5.

Published to the other packages: ``errors``, ``key``, ``protocol``, ``wire`` and ``client``; nothing else.
"""
