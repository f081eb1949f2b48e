"""Fair measuring, shared by the operators' benchmarks and by those of whole models.

``turns`` times contestants in random order, ``cold`` keeps weights out of cache, ``roofline`` says
what the machine can do at all, and ``torch_int8`` is the peer that both kinds of benchmark need.
"""
