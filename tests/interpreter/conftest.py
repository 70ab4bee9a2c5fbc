"""suite/ is collected only where Triton's interpreter is on; test_interpreter.py starts such a process."""

from resnet_fused import config

collect_ignore = [] if config.triton_interpreted() else ["suite"]
