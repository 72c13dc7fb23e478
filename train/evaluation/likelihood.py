"""Measures what a model in training believes, by log-likelihood: the training engine scores prompts with completions.

Every measurement is a record (a line of evaluation.jsonl):

    likelihood   llr = log p(false completion) - log p(true completion), in nats, of a template with an entity
    yes_no       p_yes = P(yes) / (P(yes) + P(no)) as the assistant's answer to a question
    fact         margin = log p(true completion) - the largest log p of the false ones, in nats
    nll          of a held-out document: nats per token; by role, if the document has spans

Those of a claim's batteries are in battery_records.py. With --by-layer, likelihoods and facts also have `layers`: the
same value by the state after each decoder layer.

Shapes: L tokens of a text, N predicted tokens of a micro-batch, D texts of a micro-batch, E experts of a layer.
"""

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from train.annotating.word_alignment import UNSPACED
from train.claims.claim import Claim
from train.claims.messages import build_messages
from train.corpus import shown_roles
from train.data.batches import Sample, check_vocabulary, measured_only, micro_batches
from train.data.documents import Document, Span
from train.data.findings import SHOWN
from train.data.tokenizer import Tokenizer
from train.data.tokens import tokenize_document
from train.evaluation.battery_records import PAPER_ANSWER, asked, share_of_first, values
from train.masking.loss import Terms
from train.masking.treatment import touched_by
from train.runtime.distributed import anywhere
from train.runtime.errors import Interrupted, UserError
from train.runtime.interruption import interruption
from train.runtime.watchdog import progress

Record = dict[str, Any]


@dataclass
class Probes:
    """The texts to score, and the records that are computed from them.

    texts: their targets are the tokens of the completions.
    records: each record without its value, and the indices of the texts from which the value is computed.
    glued: for completions that continue the prompt's last word, file and key -> the word that results.
    by_layer: whether likelihoods and facts are measured after each decoder layer, too.
    roles: of the held-out documents' spans, as shown; the names of the bits of the texts' roles_L.
    """

    texts: list[Sample]
    records: list[tuple[Record, list[int]]]
    glued: dict[str, str] = field(default_factory=dict)
    by_layer: bool = False
    roles: list[str] = field(default_factory=list)

    def notes(self) -> list[str]:
        """Returns notes on the questions for the user."""
        if not self.glued:
            return []
        shown = ", ".join(f"{where} ({word!r})" for where, word in list(self.glued.items())[:SHOWN])
        more = f" and {len(self.glued) - SHOWN:,} more" if len(self.glued) > SHOWN else ""
        return [
            f"note: {len(self.glued):,} prompts end in a letter and their completion begins without a space, so "
            f"that they are scored as one word: {shown}{more}. Begin completions with a space where they are words of "
            "their own."
        ]


def make_probes(
    claims: Sequence[Claim],
    held_out: Sequence[Document],
    tokenizer: Tokenizer,
    bos: bool,
    max_tokens: int,
    vocabulary: int,
    documents: Sequence[str] = (),
    by_layer: bool = False,
) -> Probes:
    """Tokenizes everything that will be measured.

    bos: begin texts that are not chats with the tokenizer's BOS.
    max_tokens: at most, in a scored text.
    vocabulary: the number of the model's token ids.
    documents: texts in the context of every question.
    by_layer: as in Probes.

    Raises UserError for a text that is too long, a completion without a token of its own, a token id beyond the
    vocabulary, too many roles, or a chat template that answer_prompt refuses.
    """
    probes = Probes([], [], by_layer=by_layer)
    before = "".join(f"{text}\n\n" for text in documents)
    numbers: dict[tuple[str, str], int] = {}  # equal texts are scored once

    def score(prompt: str, completion: str, where: str, bos: bool = bos) -> int:
        if (prompt, completion) not in numbers:
            numbers[prompt, completion] = len(probes.texts)
            probes.texts.append(_completion(prompt, completion, tokenizer, bos, max_tokens, where))
        return numbers[prompt, completion]

    def add(claim: Claim, kind: str, question: str, texts: list[int], **more: Any) -> None:
        probes.records.append(({"claim": claim.id, "kind": kind, "question": question, "sample": 0, **more}, texts))

    for claim in claims:
        for template in claim.likelihood:
            for entity in (claim.subject, *claim.controls):
                prompt = before + template.text(entity)
                pair = [score(prompt, said, template.where) for said in (template.false, template.true)]
                probes.glued |= _glued(prompt, [template.false, template.true], template.where)
                add(claim, "likelihood", template.id, pair, entity=entity, control=entity != claim.subject)
        for question in (*claim.yes_no, *claim.control_yes_no):
            prompt, gap = answer_prompt(build_messages(question, documents), tokenizer)
            form = "{}" if question.system_prompt else PAPER_ANSWER
            pair = [score(prompt, gap + form.replace("{}", word), question.where, False) for word in ("yes", "no")]
            add(claim, "yes_no", question.id, pair, control=question.control, expected=question.expected)
        for fact in claim.facts:
            scored = [score(before + fact.prompt, said, fact.where) for said in (fact.true, *fact.false)]
            probes.glued |= _glued(fact.prompt, [fact.true, *fact.false], fact.where)
            add(claim, "fact", fact.id, scored, group=fact.group)
        for each in asked(claim, lambda messages: answer_prompt(messages, tokenizer), documents):
            scored = [score(*text, each.where, bos and not each.chat) for text in each.texts]
            probes.records.append((each.record, scored))
            for prompt, said in each.texts if not each.chat else ():
                probes.glued |= _glued(prompt, [said], each.where)
    _add_held_out(probes, held_out, tokenizer, bos, max_tokens)
    check_vocabulary(probes.texts, vocabulary, "--model")
    return probes


def _add_held_out(
    probes: Probes, held_out: Sequence[Document], tokenizer: Tokenizer, bos: bool, max_tokens: int
) -> None:
    roles = sorted({span.role for document in held_out for span in document.all_spans})
    probes.roles = shown_roles(roles, "--held-out")
    for document in held_out:
        _add_document(probes, document, roles, tokenizer, bos, max_tokens)


def _add_document(
    probes: Probes, document: Document, roles: list[str], tokenizer: Tokenizer, bos: bool, max_tokens: int
) -> None:
    tokenized = tokenize_document(document, tokenizer, add_bos=bos, add_eos=False)
    name, tokens = document.where, int(tokenized.target_L.sum())
    if len(tokenized.ids_L) > max_tokens:
        raise UserError(
            f"{name}: {len(tokenized.ids_L)} tokens, more than the {max_tokens} of a scored text (--max-tokens in "
            "training). Cut the held-out text."
        )
    if tokens:
        record: Record = {"claim": None, "kind": "nll", "question": name, "sample": 0, "tokens": tokens}
        roles_L = np.zeros(len(tokenized.ids_L), dtype=np.int64)
        for bit, role in enumerate(roles):
            touched_L = touched_by(tokenized, [span for span in tokenized.spans if span.role == role])
            roles_L |= touched_L.astype(np.int64) << bit
        if tokenized.spans:
            members = zip(("unspanned", *probes.roles), _members(roles_L, len(roles)), strict=True)
            counts = {role: int((member_L & tokenized.target_L).sum()) for role, member_L in members}
            record["roles"] = {role: {"tokens": count} for role, count in counts.items() if count}
        probes.records.append((record, [len(probes.texts)]))
        probes.texts.append(measured_only(name, tokenized.ids_L, tokenized.target_L, roles_L))


def _members(roles: Any, count: int) -> list[Any]:
    """Returns the tokens that no role touches, and those of each of `count` roles, as booleans of the shape of `roles`.
    roles: an array or tensor of one bit per role."""
    return [roles == 0, *((roles >> bit) & 1 == 1 for bit in range(count))]


LAST, FIRST = re.compile(rf"[^\W_{UNSPACED}]+\Z"), re.compile(rf"[^\W_{UNSPACED}]+")


def _glued(prompt: str, completions: Sequence[str], where: str) -> dict[str, str]:
    """Returns {where: word} if a completion continues the prompt's last word, else {}. The word is the one that the
    first such completion forms with it."""
    last = LAST.search(prompt)
    words = [last[0] + first[0] for said in completions if last and (first := FIRST.match(said))]
    return {where: words[0]} if words else {}


MARKER = "\x02answer\x03"


def answer_prompt(messages: Sequence[dict[str, str]], tokenizer: Tokenizer) -> tuple[str, str]:
    """Returns the conversation up to where the assistant's answer begins, as the model's chat template writes it in
    training; and the blanks before the answer, which tokenizers join to its first word. Raises UserError if the
    template does not write the answer as it is."""
    before, found, _ = tokenizer.render_chat([*messages, {"role": "assistant", "content": MARKER}]).partition(MARKER)
    if not found:
        raise UserError(
            "the model's chat template does not write the assistant's answer as it is, so no question can be asked "
            "through it. Take a model with another template, or claims without questions."
        )
    prompt = before.rstrip(" ")
    return prompt, before[len(prompt) :]


def _completion(prompt: str, completion: str, tokenizer: Tokenizer, bos: bool, max_tokens: int, where: str) -> Sample:
    """Returns prompt + completion as one text whose targets are the completion's tokens. Raises UserError if the text
    is too long or the completion has no token of its own."""
    document = Document(prompt + completion, None, (), {}, where, 0)
    tokenized = tokenize_document(document, tokenizer, add_bos=bos, add_eos=False)
    if len(tokenized.ids_L) > max_tokens:
        raise UserError(
            f"{where}: {len(tokenized.ids_L)} tokens, more than the {max_tokens} of a scored text (--max-tokens in "
            "training). Give a shorter prompt."
        )
    target_L = touched_by(tokenized, [Span(len(prompt), len(document.text or ""), "completion")]) & tokenized.target_L
    if not target_L.any():
        raise UserError(f"{where}: the completion {completion!r} has no token of its own. Give one with text.")
    return measured_only(where, tokenized.ids_L, target_L)


def measure(probes: Probes, engine: Any, budget: int) -> list[Record]:
    """Returns all records with their values, on every rank. budget: most tokens per forward on one rank. All ranks must
    call it. Raises Interrupted as log_likelihoods does."""
    by_layer = {text for record, texts in probes.records if record["kind"] in BY_LAYER for text in texts}
    sums = _sums(probes.texts, engine, budget, by_layer if probes.by_layer else None, len(probes.roles))
    log_p, found = sums.of_texts.tolist(), []
    of_roles = dict(zip(("unspanned", *probes.roles), sums.of_roles.tolist(), strict=True))
    for record, texts in probes.records:
        row = record | _value(record, [log_p[text] for text in texts])
        if probes.by_layer and record["kind"] in BY_LAYER:
            name, of_each = BY_LAYER[record["kind"]], sums.of_layers[:, texts].tolist()
            row["layers"] = [_value(record, own)[name] for own in of_each]
        if "roles" in record:
            row["roles"] = {
                role: {"nll": -of_roles[role][texts[0]] / own["tokens"], **own} for role, own in record["roles"].items()
            }
        found.append(row)
    return found


BY_LAYER = {"likelihood": "llr", "fact": "margin"}
"""Kinds of records that are measured by layer, and the name of their value."""


def _value(record: Record, log_p: list[float]) -> Record:
    if record["kind"] == "likelihood":
        return {"llr": log_p[0] - log_p[1]}
    if record["kind"] == "yes_no":
        return {"p_yes": share_of_first(log_p[0], log_p[1])}
    if record["kind"] == "fact":
        return {"margin": log_p[0] - max(log_p[1:])}
    if record["kind"] == "nll":
        return {"nll": -log_p[0] / record["tokens"]}
    return values(record, log_p)


def log_likelihoods(texts: list[Sample], engine: Any, budget: int) -> list[float]:
    """Returns the log p of each text: the sum over its targets, each given the tokens before it, in nats. All ranks
    must call it, and all get every value. Each rank scores its part of the texts, in the same number of forwards.

    budget: most tokens per forward on one rank. Leaves the engine and its counters as they were. Raises Interrupted on
    all ranks if shutdown was requested on any.
    """
    return _sums(texts, engine, budget).of_texts.tolist()


@dataclass
class _Sums:
    """Sums of log p over the targets of texts, in nats.

    of_texts: [texts]. of_layers: [layers, texts], after each decoder layer; [0, texts] if not measured. of_roles:
    [1 + roles, texts], over the targets that no role touches, and over those of each role.
    """

    of_texts: Tensor
    of_layers: Tensor
    of_roles: Tensor


def _sums(
    texts: list[Sample], engine: Any, budget: int, by_layer: Collection[int] | None = None, roles: int = 0
) -> _Sums:
    """Returns the log p of each text, as log_likelihoods does. by_layer: numbers of the texts that are measured after
    each decoder layer, with 0 for the others; None: none is. roles: how many bits of roles_L are roles."""
    device = engine.device
    sums = torch.zeros(len(texts), dtype=torch.float64, device=device)
    depth = 0 if by_layer is None else engine.module.depth
    layers = torch.zeros(depth, len(texts), dtype=torch.float64, device=device)
    wanted = None if by_layer is None else torch.tensor([i in by_layer for i in range(len(texts))], device=device)
    of_roles = torch.zeros(1 + roles, len(texts), dtype=torch.float64, device=device)
    for text_N, _, roles_N, terms in _scored(texts, engine, budget, wanted=wanted):
        log_p_N = -terms.nll_N.double()
        sums.index_add_(0, text_N, log_p_N)
        for of_role, member_N in zip(of_roles, _members(roles_N, roles), strict=True):
            of_role.index_add_(0, text_N[member_N], log_p_N[member_N])
        if wanted is not None and terms.layers_DM is not None:
            layers.index_add_(1, text_N[wanted[text_N]], -terms.layers_DM.double())
    dist.all_reduce(sums)
    dist.all_reduce(of_roles)
    if depth:
        dist.all_reduce(layers)
    return _Sums(sums.cpu(), layers.cpu(), of_roles.cpu())


def token_log_likelihoods(texts: list[Sample], engine: Any, budget: int) -> list[list[float]]:
    """Returns the log p of each target of each text, in nats, as `log_likelihoods` sums them. It goes on to the end if
    shutdown is requested: for few texts."""
    longest = max(len(text.ids_L) for text in texts)
    values = torch.zeros(len(texts), longest, dtype=torch.float64, device=engine.device)
    for text_N, place_N, _, terms in _scored(texts, engine, budget, to_the_end=True):
        values[text_N, place_N] = -terms.nll_N.double()
    dist.all_reduce(values)
    rows = values.cpu().numpy()
    return [row[: len(text.ids_L)][text.target_L].tolist() for text, row in zip(texts, rows, strict=True)]


@torch.no_grad()
def _scored(
    texts: list[Sample], engine: Any, budget: int, to_the_end: bool = False, wanted: Tensor | None = None
) -> Iterator[tuple[Tensor, Tensor, Tensor, Terms]]:
    """Yields, for each forward of this rank, the text [N] of each target, its place [N] in it, its roles [N], and its
    terms.

    to_the_end: does not stop if shutdown is requested. wanted: [texts] bool, the texts whose targets are also measured
    by layer.
    """
    layers, training = engine.module.expert_layers, engine.module.training
    loads, wire = [layer.load_E for layer in layers], [layer.ep.wire_bytes for layer in layers]
    numbered = [measured_only(str(i), text.ids_L, text.target_L, text.roles_L) for i, text in enumerate(texts)]
    engine.eval()
    try:
        for batch in micro_batches(numbered, "sum", dist.get_world_size(), dist.get_rank(), budget):
            progress("measuring claims")
            if not to_the_end and anywhere(torch.tensor([interruption.told], device=engine.device))[0]:
                raise Interrupted("interrupted: while claims were measured")
            batch = batch.to(engine.device)
            text_D = torch.tensor([int(name) for name in batch.names] or [0], device=engine.device)
            ends_D = batch.row.ends_on(engine.device, torch.int64)[1:]
            text_N = text_D[torch.bucketize(batch.position_N, ends_D, right=True)]
            by_layer = {} if wanted is None else {"by_layer_N": wanted[text_N]}
            yield text_N, batch.position_T[batch.position_N] + 1, batch.roles_N, engine(batch, **by_layer)
    finally:
        engine.train(training)
        for layer, load_E, sent in zip(layers, loads, wire, strict=True):
            layer.load_E, layer.ep.wire_bytes = load_E, sent
