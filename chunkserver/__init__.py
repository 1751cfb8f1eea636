"""The chunkserver: the bytes of one disk. See docs/design.md section 6.

Published to the other packages: ``protocol``, ``chunkfile`` (the format only) and ``client``; nothing else.
"""
