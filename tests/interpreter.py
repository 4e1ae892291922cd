"""Makes Triton's interpreter twice as fast and its FP8 exact, if it is enabled."""

import os

import torch


def look_up_language_once():
    """
    During a launch, the interpreter replaces triton.language's functions. It searches all of them again whenever one
    @triton.jit function calls another, which takes half of a test's time. During these calls everything is already
    replaced, so the search is skipped.
    """
    if os.environ.get('TRITON_INTERPRET') != '1':
        return
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:  # the tests that need Triton are skipped
        return
    patch, languages = interpreter._patch_lang, {}

    def patch_once(fn):
        key = id(fn.__globals__)
        if key not in languages:
            languages[key] = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
        if any(tl.core.is_builtin(language.load) for language in languages[key]):
            return patch(fn)

    interpreter._patch_lang = patch_once


def round_to_fp8():
    """
    Makes the interpreter convert to fp8 as PyTorch does: to the nearest number, with NaN for NaN. Triton's own
    conversion truncates and knows no NaN. A number out of range becomes NaN too, so tests notice a missing clamp.
    """
    if os.environ.get('TRITON_INTERPRET') != '1':
        return
    try:
        import triton.language as tl
        from triton.runtime import interpreter
    except ImportError:
        return
    convert, builder = interpreter.InterpreterBuilder.create_fp_to_fp, interpreter.InterpreterBuilder
    formats = {tl.float8e4nv: torch.float8_e4m3fn, tl.float8e5: torch.float8_e5m2}

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        dtype = formats.get(dst_type.scalar)
        if dtype is None or src.dtype.scalar != tl.float32:
            return convert(self, src, dst_type, rounding_mode)
        q = torch.from_numpy(src.data.copy()).to(dtype).view(torch.uint8).numpy()
        return interpreter.TensorHandle(q, dst_type.scalar)

    builder.create_fp_to_fp = create_fp_to_fp
