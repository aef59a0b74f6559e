"""The update rules of ``csrc/rules`` in Triton, over lists of tensors: one launch per pass whatever their number.

``tam`` and ``adatam`` each offer ``step_(step)``, a whole optimizer step, and ``reduce(step)`` with
``apply_(step, sums)``, the same in two halves for an all-reduce in between. ``step`` is a
:class:`torsion.ops._frame.Step`. ``lookbehind`` offers them for the passes of an outer step, each a
:class:`torsion.ops._frame.Phase`; ``sgd`` and ``adam`` hold the equations of bases that have no step here. They compute
what the compiled back ends compute (``csrc/engine/frame.h``), on CUDA tensors; with TRITON_INTERPRET=1 set before the
first import, on CPU tensors, for tests.

===============  ======================================================================================
``engine.py``    what the rules share: the reduce pass, the sums, the step's decision, the launches
``table.py``     pointer tables: where the tensors lie, cut into chunks, cached between steps
``storage.py``   bfloat16 and float16 to float32 and back, to nearest or stochastically (types.h)
``philox.py``    the random bits of stochastic rounding (rules/philox.h)
``normals.py``   standard normals from the same blocks (rules/philox_normal.h)
``demp.py``      DemP's noise over lists of tensors
``flags.py``     DemP's detector of live units
``masked.py``    a linear layer on live units: gathers, product, activation and its bits in one kernel
===============  ======================================================================================
"""
