"""Where a forward multiplier belongs in a given model: the matrix itself, its final norm, its queries, its branch ends."""

from __future__ import annotations

from .drafts import Draft
from .errors import RequestError
from .observing.specs import Observation, ParamSpec

__all__ = ["fold_all"]


def fold_all(draft: Draft) -> None:
    """Write every multiplier that the table, the recipe and the model's own forward pass ask for into parameters.

    Raises:
        RequestError: a multiplier that no parameter carries, or whose carrier has another use.
    """
    _fold_constants(draft)
    _fold_ends(draft)
    _fold_sizes(draft)
    _fold_ties(draft)
    _fold_attention(draft)
    _fold_dots(draft)
    _fold_branches(draft)


def _fold_constants(draft: Draft) -> None:
    """Divide out what the model's own forward pass multiplies with more as it gets wider (√width on embeddings)."""
    if not draft.rules.divides_out:
        return
    for name, spec in draft.seen.specs.items():
        c = draft.wider**-spec.constant
        draft.fold([name], size=c)
        if c != 1:
            draft.notes.append(
                f"the forward pass multiplies {name} with width^{spec.constant:g}: divided out of its settings ({c:.4g})."
            )


def _fold_ends(draft: Draft) -> None:
    """Write the input and output multipliers of the recipe into their matrices, or what sets the sizes of these."""
    sized = {spec.sizes: name for name, spec in draft.seen.specs.items() if spec.sizes}
    for name, spec in draft.seen.specs.items():
        if spec.role == "output":
            draft.fold([sized.get(name, name)], alpha=draft.recipe.alpha_output)
        elif spec.role in ("input", "finite") and spec.on_data and len(spec.shape) > 1 and not spec.sizes:
            draft.fold([sized.get(name, name)], alpha=draft.recipe.alpha_input)


def _fold_sizes(draft: Draft) -> None:
    """A row of a normalized weight is as long as its size says: as long as the table would have the plain matrix's.

    Of n entries of standard deviation s, a row is s·√n long; a fan-in initialization keeps that, a readout's does not.
    """
    for name, spec in draft.seen.specs.items():
        if not spec.sizes:
            continue
        target = next(each for each, origin in draft.origin.items() if origin == spec.sizes)
        m_in, m_out = draft.multipliers(target)
        draft.fold([name], size=draft.rules.rows[draft.spec(target).role].init(m_in, m_out) * m_in**0.5)


def _fold_ties(draft: Draft) -> None:
    """Pass the readout's multiplier of a matrix that is also the embedding on to the final norm."""
    for name, spec in draft.seen.specs.items():
        if not spec.tied:
            continue
        target = next(each for each, origin in draft.origin.items() if origin == name)
        # What the matrix itself took on as an embedding (a constant, alpha_input) must come off again behind it.
        m = draft.multipliers(target)[1]
        size = draft.rules.readout(m, 1.0) / draft.size[target].gauge * draft.wider**-spec.readout_constant
        alpha = draft.recipe.alpha_output / draft.alpha[target].gauge
        if size == 1 and alpha == 1:
            continue
        if not spec.carriers:
            raise RequestError(
                f"the readout is tied to {name} and nothing before it can carry its factor {size * alpha:g}: give the "
                "model a final norm with a gain, or untie the readout."
            )
        _refuse_other_use(draft.seen, spec, name)
        draft.fold(spec.carriers, size=size, alpha=alpha)
        if size != 1:
            draft.notes.append(f"tied readout: its factor {size:g} is folded into {', '.join(sorted(spec.carriers))}.")


def _refuse_other_use(seen: Observation, tied: ParamSpec, readout: str) -> None:
    """What a carrier feeds besides the readout would be scaled with it."""
    also = [name for name, spec in seen.specs.items() if name != readout and spec.meets & tied.carriers]
    if also or tied.busy_carriers:
        fed = also[0] if also else "something else"
        raise RequestError(
            f"the readout tied to {readout} passes its factor to {min(tied.carriers)}, which also feeds {fed}: give it a norm of "
            "its own, or untie the readout."
        )


def _fold_attention(draft: Draft) -> None:
    """Turn the model's own scaling of attention into α·√d₀/d by scaling the queries, where the head dim d grows.

    TP-V 2203.03466, Definition 4.1, which starts from 1/√d; a model that already divides by d needs no factor.
    """
    seen, alpha = draft.seen, draft.recipe.alpha_attention
    if seen.heads.dim is None:
        if alpha != 1:
            raise RequestError(
                f"alpha_attention is {alpha:g} and the model has no attention that could be seen: leave it at 1."
            )
        return
    m_h = seen.heads.ratio
    c = draft.rules.attention(m_h, 1.0) ** (2 * (1 + seen.heads.power))  # the table counts from 1/√d
    if c == 1 and alpha == 1:
        return
    if seen.shared_queries:
        raise RequestError(
            f"attention asks for a factor {c * alpha:.4g} on the queries alone, and {min(seen.shared_queries)} "
            "also makes keys, values or something else: split it into its own query "
            "projection, or keep the head dim fixed and alpha_attention 1."
        )
    if not seen.queries:
        raise RequestError(
            "attention asks for a factor on the queries, and no parameter carries it: use a query projection."
        )
    draft.fold(seen.queries, size=c, alpha=alpha)
    if c != 1:
        draft.notes.append(f"head dim grows {m_h:g}x: 1/d attention is folded into the queries ({c:.4g}).")


def _fold_dots(draft: Draft) -> None:
    """Give every other dot product of activations that grew m times the 1/m that attention's logits get."""
    for each in draft.seen.dots:
        c = draft.rules.attention(each.ratio, 1.0) ** (2 * (1 + each.power))
        if c == 1:
            continue
        if not each.carriers or any(draft.seen.specs[name].mixed for name in each.carriers):
            raise RequestError(each.refusal(c))
        draft.fold(each.carriers, size=c**0.5 if each.both else c)
        draft.notes.append(
            f"the result of {', '.join(sorted(each.carriers))} is multiplied with other activations and summed over "
            f"{each.ratio:g} times as many entries: a factor {c:.4g} is folded into {'both sides' if each.both else 'it'}."
        )


def _fold_branches(draft: Draft) -> None:
    """Write the multiplier of residual branches, m_L^-α and the recipe's own, into whatever ends each branch."""
    power = draft.rules.depth
    alpha = draft.recipe.alpha_residual
    ends = sorted(name for name, spec in draft.seen.specs.items() if spec.ends_branch)
    if power is None and draft.deeper != 1:
        draft.notes.append(draft.rules.without_depth(draft.base.depth, draft.scale.depth))
    if power is not None:
        _fold_depth_constants(draft)

    def size(name: str) -> float:
        return 1.0 if power is None else draft.repeated(name) ** float(power.branch)

    asked = 1.0 if power is None else draft.deeper ** float(power.branch)
    if asked == 1 and alpha == 1:
        return
    open_branches = [name for name in draft.seen.open_branches if size(name) != 1 or alpha != 1]
    if not ends or open_branches:
        found = (
            f"no parameter carries it into the branch of {open_branches[0]}"
            if open_branches
            else "no residual branch was seen"
        )
        raise RequestError(
            f"residual branches ask for a factor {asked * alpha:.4g}, and {found}: end every branch in a linear layer or a gain."
        )
    for name in ends:
        if size(name) != 1 or alpha != 1:
            _refuse_way_out(draft.seen.specs[name])
            draft.fold([name], size=size(name), alpha=alpha)
    if once := [name for name in ends if asked != 1 and size(name) == 1]:
        draft.notes.append(
            f"{', '.join(once[:3])}{f' and {len(once) - 3} more' if once[3:] else ''}: a residual branch that depth does not "
            "repeat, so it keeps its size."
        )


def _fold_depth_constants(draft: Draft) -> None:
    """Divide out what the model's own forward pass multiplies with as it gets deeper: the table says how branches shrink."""
    powers = {name: spec.depth_constant for name, spec in draft.seen.specs.items() if spec.depth_constant}
    for power in sorted(set(powers.values())):
        names = [name for name, each in powers.items() if each == power]
        c = draft.deeper**-power
        draft.fold(names, size=c)
        if c != 1:
            draft.notes.append(
                f"the forward pass multiplies {names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''} with "
                f"depth^{power:g}: divided out of their settings ({c:.4g})."
            )


def _refuse_way_out(spec: ParamSpec) -> None:
    if not spec.inside:
        raise RequestError(
            f"{spec.name} ends a residual branch and is used outside of it as well: give the branch a layer of its own."
        )
