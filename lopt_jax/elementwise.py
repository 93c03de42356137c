"""Whether a program treats all elements of its arrays alike, so that it is right on shards of them.

Only what is known to be elementwise is admitted. A primitive that is not listed here, one of a
later jax among them, is refused by its name.
"""

import enum
from collections.abc import Sequence
from typing import Any

import jax.extend.core


class Kind(enum.IntEnum):
    """What a value of a program is."""

    UNIFORM = 0  # a number that is the same everywhere, or an array that repeats it
    SHARD = 1  # elements of a leaf, each in its place
    OTHER = 2  # an array with a meaning of its own: positions, random numbers, tables


def _names(words: str) -> frozenset[str]:
    return frozenset(words.split())


# Functions of this library, which know how to sum over shards. No other function has these names.
OWN_FUNCTIONS = _names("lopt_update_of_shards lopt_clip_of_shards lopt_all_finite_of_shards")

_ELEMENTWISE = _names(
    """
    abs acos acosh add add_any add_jaxvals and asin asinh atan atan2 atanh bessel_i0e bessel_i1e
    cbrt ceil clamp clz complex conj convert_element_type copy copy_p cos cosh digamma div eq eq_to
    erf erf_inv erfc exp exp2 expm1 floor ge gt igamma igammac imag integer_pow is_finite le le_to
    lgamma log log1p log2 logistic lt lt_to max min mul name ne neg nextafter not
    one_minus_square optimization_barrier or pcast polygamma population_count pow pvary real
    reduce_precision rem round rsqrt select_n shift_left shift_right_arithmetic
    shift_right_logical sign sin sinh sqrt square stop_gradient sub tan tanh xor zeta
    """
)
_CALLS = _names(
    """
    call checkpoint closed_call core_call custom_jvp_call custom_vjp_call custom_vjp_call_jaxpr jit
    pjit remat remat2
    """
)
_INNER = ("jaxpr", "call_jaxpr", "fun_jaxpr")  # the parameter that holds a call's program


class NotElementwiseError(NotImplementedError):
    """A primitive does not treat every element of a leaf alike.

    Attributes:
      primitive: its name.
    """

    def __init__(self, primitive: str) -> None:
        super().__init__(primitive)
        self.primitive = primitive


def kinds_of_outputs(jaxpr: Any, inputs: Sequence[Kind]) -> list[Kind]:
    """Checks a program, and says what it returns.

    Args:
      jaxpr: the program.
      inputs: what each of its arguments is.

    Returns:
      The kind of every output.

    Raises:
      NotElementwiseError: something other than elementwise arithmetic is done with elements of a
        leaf, outside of `OWN_FUNCTIONS`.
    """
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)  # of a closed one
    kinds = dict(zip(jaxpr.invars, inputs, strict=True))
    kinds |= {v: _of_constant(v) for v in jaxpr.constvars}
    kind_of = lambda v: (  # noqa: E731
        Kind.UNIFORM if isinstance(v, jax.extend.core.Literal) else kinds[v]
    )
    for eqn in jaxpr.eqns:
        outputs = _kinds_after(eqn, [kind_of(v) for v in eqn.invars])
        kinds |= zip(eqn.outvars, outputs, strict=True)
    return [kind_of(v) for v in jaxpr.outvars]


def _of_constant(variable: Any) -> Kind:
    return Kind.OTHER if variable.aval.ndim else Kind.UNIFORM


def _kinds_after(eqn: Any, inputs: list[Kind]) -> list[Kind]:
    name, params = eqn.primitive.name, eqn.params
    if name in _CALLS:
        if params.get("name") in OWN_FUNCTIONS:
            return [Kind.SHARD if v.aval.ndim else Kind.UNIFORM for v in eqn.outvars]
        inner = next(params[key] for key in _INNER if key in params)
        return kinds_of_outputs(inner, inputs)
    if name == "cond":
        return _after_cond(params["branches"], inputs)
    if name == "while":
        return _after_while(params, inputs)
    if name == "scan":
        return _after_scan(eqn, inputs)
    if name in _ELEMENTWISE:
        kind = max(inputs, default=Kind.UNIFORM)
        if kind is Kind.OTHER and Kind.SHARD in inputs:
            raise NotElementwiseError(f"{name} (with an array that is no leaf)")
        return inputs if name == "optimization_barrier" else [kind] * len(eqn.outvars)
    if Kind.SHARD in inputs:
        raise NotElementwiseError(name)
    if name == "axis_index":
        return [Kind.OTHER]
    repeats = name == "broadcast_in_dim" and inputs[0] is Kind.UNIFORM
    return [Kind.OTHER if v.aval.ndim and not repeats else Kind.UNIFORM for v in eqn.outvars]


def _after_cond(branches: Sequence[Any], inputs: list[Kind]) -> list[Kind]:
    which, *operands = inputs
    if which is not Kind.UNIFORM:
        raise NotElementwiseError("cond")
    return _joined([kinds_of_outputs(branch, operands) for branch in branches])


def _after_while(params: dict[str, Any], inputs: list[Kind]) -> list[Kind]:
    of_condition, of_body = params["cond_nconsts"], params["body_nconsts"]
    condition_constants = inputs[:of_condition]
    body_constants = inputs[of_condition : of_condition + of_body]
    carry = inputs[of_condition + of_body :]

    def body(carry: list[Kind]) -> list[Kind]:
        return kinds_of_outputs(params["body_jaxpr"], [*body_constants, *carry])

    carry = _settled(body, carry)
    if kinds_of_outputs(params["cond_jaxpr"], [*condition_constants, *carry]) != [Kind.UNIFORM]:
        raise NotElementwiseError("while")
    return carry


def _after_scan(eqn: Any, inputs: list[Kind]) -> list[Kind]:
    """After a scan, whose operands are told apart by their ranks: rows have an axis less.

    Releases of jax differ in the parameters that say it.
    """
    body = eqn.params["jaxpr"].jaxpr
    is_row = [x.aval.ndim > r.aval.ndim for x, r in zip(eqn.invars, body.invars, strict=True)]
    if any(row and kind is Kind.SHARD for row, kind in zip(is_row, inputs, strict=True)):
        raise NotElementwiseError("scan")  # a turn sees one row of the leaf
    is_stacked = [x.aval.ndim > r.aval.ndim for x, r in zip(eqn.outvars, body.outvars, strict=True)]
    of_carry = is_stacked.count(False)
    first = is_row.count(False) - of_carry  # constants, then the carry, then rows

    def turn(carry: list[Kind]) -> list[Kind]:
        operands = [*inputs[:first], *carry, *inputs[first + of_carry :]]
        return kinds_of_outputs(body, operands)

    carry = _settled(lambda kinds: turn(kinds)[:of_carry], inputs[first : first + of_carry])
    stacked = turn(carry)[of_carry:]
    if Kind.SHARD in stacked:
        raise NotElementwiseError("scan")
    return [*carry, *(Kind.OTHER for _ in stacked)]


def _settled(body: Any, carry: list[Kind]) -> list[Kind]:
    """The kinds that a loop's carry has after any number of turns."""
    while (after := _joined([carry, body(carry)])) != carry:
        carry = after
    return carry


def _joined(alternatives: Sequence[Sequence[Kind]]) -> list[Kind]:
    return [max(kinds) for kinds in zip(*alternatives, strict=True)]
