"""SHELF: merge methods. One file is one method: one pure function of the file's name.

The module docstring is a one-line summary. The function's docstring gives the formula, the source (paper or
project) and, under `Args:`, every knob. Inputs are positional tensors: `a, b, c` for methods of exactly that many
models, `*models` for any number; a first parameter called `base` is the common ancestor and is given by `--base`.
Knobs are keyword-only with literal defaults and annotated `float`, `int`, `bool`, `str`, `Literal[...]` or
`tuple[float, ...]` (one number per model, empty = all equal). Any float knob may vary per block (see core.dial).
A knob that makes no sense outside a range says so under `Args:` in brackets, `density (0 to 1): ...` or
`rank (0 or more): ...`: that is checked before a tensor is read, in dry runs too.

`EXECUTION` (a string literal at module level) tells the engine how much of a tensor the function must see:

    "linear"       only `+ - *` of inputs and numbers. The engine calls it with symbols, learns the coefficients
                   and evaluates them exactly, rounding once. Works on tensors of any shape as well.
    "elementwise"  each output element depends on the same element of the inputs. Called on flat chunks, or once with
                   symbols, which records what is done; compiled code then does it in one pass, and torch is never
                   imported. For that it is written with + - * /, abs(), < <= > >=, & | ~ and what core.elementwise
                   offers; with anything else it runs in torch.
    "gram"         f(gram, *, knobs) -> coefficients: takes the N x N matrix of inner products of the inputs (numpy
                   float64) and returns the N coefficients of the output as a linear combination of the inputs.
                   The module names the inputs in a string literal, written like a parameter list:
                       INPUTS = "a, b"  |  "a, b, c"  |  "*models"  |  "base, a, b"  |  "base, *models"
    "ranked"       like "elementwise", with a keyword `kept`: a bool tensor (S, chunk) telling which elements fall into
                   a window of the order statistics of each score. The module also defines
                       scores(*inputs) -> Tensor        (S, chunk), non-negative float32; elementwise
                       window(numel: int, *, knobs) -> tuple[int, int]     ranks [first, last) kept, 0 = largest score
                   Equal scores at the border are kept in order of increasing flat index (core.select does it).
                   The method's knobs are those of the function and of `window` together: each declares and documents
                   (`Args:`) the ones that it uses, and is called with those alone.
    "rows"         each output row (index of dim 0) depends only on the same row of the inputs.
                   Called on blocks of rows (r, ...); 0-d and 1-d tensors arrive as one row.
    "tensor"       needs the whole tensor in its real shape.
    "model"        as "tensor", with a keyword `state` made once by the module's
                       prepare(keys, read, *, knobs) -> state
                   where `read(key)` gives the list of float32 inputs of a key, and a keyword `key`. A state with
                   a `__str__` of its own says in one sentence what was found; the report shows it.

Functions receive float32 tensors (float64 if an input is) and return the same. Further optional keywords:
    gram           the inner products as for "gram", for elementwise methods that need whole-tensor norms
    noise          a counter-based random source (core.noise), for random methods; the seed is `--seed`
"""
