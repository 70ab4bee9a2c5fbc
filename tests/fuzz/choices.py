"""What scenarios choose from, each with how often."""

from __future__ import annotations

MODES = [
    (9, "with torch.no_grad():"),
    (5, "with torch.inference_mode():"),
    (3, ""),
    (2, "with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):"),
    (1, "with torch.enable_grad():"),
    (1, "with torch.inference_mode(), torch.autocast('cpu', torch.bfloat16):"),
    (1, "with torch.no_grad(), torch.backends.mkldnn.flags(enabled=False):"),
]
FORMS = [
    (30, "plain"),
    (8, "channels_last"),
    (3, "expanded"),
    (3, "sliced"),
    (2, "channels"),
    (2, "strided"),
    (3, "flipped"),
    (4, "requires_grad"),
    (1, "nonleaf"),
    (1, "parameter"),
    (3, "unbatched"),
    (2, "double"),
    (2, "bfloat16"),
    (1, "int"),
    (1, "inference"),
    (2, "numpy"),
    (3, "nan"),
    (2, "inf"),
    (1, "nans"),
    (2, "huge"),
    (2, "subclass"),
    (1, "list"),
    (1, "none"),
]
HOOKS = [
    (4, "register_forward_hook(g.see)"),
    (2, "register_forward_pre_hook(g.see_pre)"),
    (2, "register_forward_hook(g.doubles)"),
    (1, "register_forward_hook(g.doubles_in_place)"),
    (1, "register_forward_pre_hook(g.halves_pre)"),
    (1, "register_forward_hook(g.see_kwargs, with_kwargs=True)"),
    (1, "register_full_backward_hook(g.see_backward)"),
    (1, "register_forward_hook(g.see, always_call=True)"),
]
FUSE_OPTIONS = [
    (28, ""),
    (6, ", inplace=True"),
    (2, ", precision='exact'"),
    (2, ", inplace=True, precision='exact'"),
    (1, ", backend='reference'"),
]
CALLS = [
    (40, "call"),
    (6, "grads"),
    (4, "twice"),
    (2, "threads"),
    (2, "functional"),
    (2, "again"),
    (2, "train"),
    (2, "mc"),
    (5, "inside"),
    (1, "transform"),
]
CHANGES = [
    (5, "values"),
    (3, "hook"),
    (3, "setting"),
    (3, "mode"),
    (2, "structure"),
    (2, "copying"),
    (2, "conversion"),
    (1, "reparametrize"),
    (1, "method"),
]
# Sets a module whose parameters are the same on every side.
REPLACE = """new = {new}
for i, p in enumerate(new.parameters()):
    p.data = fresh(p, i)
setattr({owner}, {name!r}, new)"""
