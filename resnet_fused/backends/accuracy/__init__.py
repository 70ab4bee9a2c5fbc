"""Whether results are as good as stock's: the tolerance, the one judge of results, and problems' tensors to try kernels on."""

from resnet_fused.backends.accuracy.check import ProblemCheck
from resnet_fused.backends.accuracy.judge import Verdict, difference, judge, misplaced
from resnet_fused.backends.accuracy.tensors import activations, inputs_of, more_inputs_of, parameters_of, with_nan_and_inf
from resnet_fused.backends.accuracy.tolerance import allowed, relative_error

__all__ = [
    "ProblemCheck",
    "Verdict",
    "activations",
    "allowed",
    "difference",
    "inputs_of",
    "judge",
    "misplaced",
    "more_inputs_of",
    "parameters_of",
    "relative_error",
    "with_nan_and_inf",
]
