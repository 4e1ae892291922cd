"""Makes Triton's interpreter twice as fast, if it is enabled."""

import os


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
