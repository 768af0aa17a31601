"""Calls jax-triton, of either line. All that reaches into private parts of it, or hides PyTorch from Triton, is here.

jax-triton 0.3 serves Python 3.11; jax-triton 0.4 (Python 3.12, Triton 3.7 and later) is the maintained line.

- `use_ffi_call`: jax-triton 0.3 names jaxlib's older entry for kernels, for which XLA ends a CUDA graph and the host
  launches kernel by kernel. Unnecessary from jax-triton 0.4 on, which names the FFI entry; it is not done there.
- `_call_0_3` and `_call_0_4`, for outputs that take over an input: 0.3 has `out_shape` and `input_output_aliases` and
  gives a kernel both pointers, 0.4 has `out_type` and `Ref` and gives it one. Unnecessary when 0.3 is given up:
  `_call_0_4` remains.
- `without_pytorch`: Triton before 3.8 imports PyTorch where it is installed, which takes 3.5 s, to know its tensors.
  Unnecessary from Triton 3.8 on, which only looks whether PyTorch was imported, and would fail where it is hidden.
- `LINE_INFO`: a call carries its kernel's text with it, by which each launch looks the kernel up; without the lines of
  its source it is shorter.
- `cached_on_disk`: both lines compile a kernel anew in every process. No version makes it unnecessary.
- `enable_fp_fusion`: kernels were measured and tested with fused a * b + c. Triton 3.10 gives that default up.
"""

import contextlib
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from jax import Array

from gau.imports import without_pytorch
from gau.ops.kernels.kernel_cache import cached_on_disk

# The custom call of a Triton kernel that jaxlib marks as fit for CUDA graphs.
FFI_CALL = 'triton_kernel_call_ffi'
# Triton's variable that leaves them out; who profiles lines sets it to 0.
LINE_INFO = 'TRITON_DISABLE_LINE_INFO'
# Versions of XLA's interface for custom calls: contents as one string, or as named attributes.
STRING_INTERFACE, TYPED_INTERFACE = 2, 4


def triton_call(
    kernel: Any,
    inputs: Sequence[Array],
    outputs: Sequence[jax.ShapeDtypeStruct],
    *,
    grid: tuple[int, ...],
    num_warps: int,
    num_stages: int,
    overwrite: Mapping[int, int],
    constants: Mapping[str, Any],
) -> list[Array]:
    """Returns what `kernel` writes on a GPU; see `gau.ops.kernels.launch.launch`, which has the same arguments."""
    jax_triton = _jax_triton()
    call = _call_0_3 if jax_triton.__version_info__ < (0, 4) else _call_0_4
    fields = {'grid': grid, 'num_warps': num_warps, 'num_stages': num_stages, **constants}
    return call(jax_triton.triton_call, kernel, inputs, outputs, overwrite, fields)


def _call_0_3(triton_call: Callable, kernel: Any, inputs, outputs, overwrite, fields) -> list[Array]:
    aliases = dict(overwrite)
    return triton_call(
        *inputs, kernel=kernel, out_shape=list(outputs), input_output_aliases=aliases, enable_fp_fusion=True, **fields
    )


def _call_0_4(triton_call: Callable, kernel: Any, inputs, outputs, overwrite, fields) -> list[Array]:
    """An output that takes over an input is a `Ref`; a constant stands for that input's pointer, which is not used."""
    pointers = [name for name in kernel.arg_names if name not in fields]
    operands = dict(zip(pointers, inputs, strict=False))
    refs = {target: jax.new_ref(inputs[source]) for source, target in overwrite.items()}
    operands |= {pointers[source]: 1 for source in overwrite}
    operands |= {pointers[len(inputs) + target]: ref for target, ref in refs.items()}
    new = [output for target, output in enumerate(outputs) if target not in refs]
    options = {'enable_fp_fusion': True}
    results = iter(triton_call(kernel=kernel, out_type=new, backend_options=options, **operands, **fields))
    return [jax.freeze(refs[target]) if target in refs else next(results) for target in range(len(outputs))]


@functools.cache
def _jax_triton() -> Any:
    """Returns the package jax_triton, made to do what the table above says."""
    import jax_triton
    import triton
    from jax.interpreters import mlir
    from jax_triton import triton_lib
    from jaxlib import gpu_triton
    from triton._C import libtriton

    os.environ.setdefault(LINE_INFO, '1')
    triton_lib.compile_ttir_to_ptx_inplace = cached_on_disk(
        triton_lib.compile_ttir_to_ptx_inplace,
        triton_lib.CompilationResult,
        # Triton's own key has these variables as well.
        surroundings=lambda: str(
            [triton.__version__, jax_triton.__version__, *sorted(libtriton.get_cache_invalidating_env_vars().items())]
        ),
    )
    old_line = jax_triton.__version_info__ < (0, 4)
    imports_pytorch = tuple(map(int, triton.__version__.split('.')[:2])) < (3, 8)
    has_ffi_call = FFI_CALL in gpu_triton._cuda_triton.registrations()

    def lowering(*args, **params):
        target = triton_lib.get_cuda_backend if old_line else triton_lib.make_cuda_target
        with without_pytorch() if imports_pytorch else contextlib.nullcontext():
            results = triton_lib.triton_kernel_call_lowering(target, *args, **params)
        if old_line and has_ffi_call:
            use_ffi_call(jax.tree.leaves(results)[0].owner)
        return results

    mlir.register_lowering(triton_lib.triton_kernel_call_p, lowering, platform='cuda')
    return jax_triton


def use_ffi_call(call: Any) -> None:
    """Makes of a custom call to jaxlib's older entry for Triton kernels one to `FFI_CALL`, in place.

    Args:
      call: an MLIR operation `stablehlo.custom_call`; any other version of the interface than the older is left alone.
    """
    from jaxlib.mlir import ir

    attributes = call.attributes
    if ir.IntegerAttr(attributes['api_version']).value == STRING_INTERFACE:
        attributes['backend_config'] = ir.DictAttr.get({'opaque': attributes['backend_config']})
        attributes['call_target_name'] = ir.StringAttr.get(FFI_CALL)
        attributes['api_version'] = ir.IntegerAttr.get(ir.IntegerType.get_signless(32), TYPED_INTERFACE)
