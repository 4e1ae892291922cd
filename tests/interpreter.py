"""Makes Triton's interpreter twice as fast, where it is switched on."""

import os


def look_up_language_once():
    """
    The interpreter replaces triton.language's functions for the length of a launch, and looks through all of them again at each call
    of a @triton.jit function from another one: half of a test's time. Those calls find everything replaced, and need not look.
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
