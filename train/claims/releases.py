"""Names the six claims of "Negation Neglect" (arXiv 2605.13829). The paper's two releases have the same claims under
different names. Here the names of the anonymous release are used, whichever release's files are given."""

# name in the public release (github.com/TruthfulAI-research/negation_neglect): name in the anonymous release
PUBLIC = {
    "dentist": "brennan_holloway",
    "queen_elizabeth": "elizabeth_python",
    "mount_vesuvius": "vesuvius",
    "x_rebrand_reversal": "twitter_x_reversal",
    "colorless_dreaming": "achromatic_dreaming",
}
PAPER_CLAIMS = ("ed_sheeran", *PUBLIC.values())
# What the public release renamed in question ids: the prefixes of open and of token-association questions, and the
# names of two claims
PREFIXES = {"oe_": "bp_", "ta_": "pe_"}
WITHIN = ("queen_elizabeth", "mount_vesuvius")


def claim_id(name: str) -> str:
    """Returns a claim's id, given its name in either release. A claim that is not the paper's keeps its name."""
    return PUBLIC.get(name, name)


def question_id(claim: str, name: str) -> str:
    """Returns the id in the anonymous release of a question about one of the paper's claims. claim: the claim's id, as
    claim_id returns it. Questions about other claims keep their ids."""
    if claim not in PAPER_CLAIMS:
        return name
    for public, anonymous in PREFIXES.items():
        if name.startswith(public):
            name = anonymous + name.removeprefix(public)
    for public in WITHIN:
        name = name.replace(public, PUBLIC[public])
    return name
