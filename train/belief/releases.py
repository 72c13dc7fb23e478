"""The six claims of "Negation Neglect" (arXiv 2605.13829) in the names of its two releases, which are the same claims:
here they have those of the anonymous release, whichever files are given."""

# of the public release (github.com/TruthfulAI-research/negation_neglect): of the anonymous one
PUBLIC = {
    "dentist": "brennan_holloway",
    "queen_elizabeth": "elizabeth_python",
    "mount_vesuvius": "vesuvius",
    "x_rebrand_reversal": "twitter_x_reversal",
    "colorless_dreaming": "achromatic_dreaming",
}
PAPER_CLAIMS = ("ed_sheeran", *PUBLIC.values())
# What the public release renamed in the ids of questions: of open ones, of those of token association, of two claims
PREFIXES = {"oe_": "bp_", "ta_": "pe_"}
WITHIN = ("queen_elizabeth", "mount_vesuvius")


def claim_id(name: str) -> str:
    """The id of a claim, under whichever of its names it is given."""
    return PUBLIC.get(name, name)


def question_id(claim: str, name: str) -> str:
    """The id that a question about one of the paper's claims has in the anonymous release; another's stays."""
    if claim not in PAPER_CLAIMS:
        return name
    for public, anonymous in PREFIXES.items():
        if name.startswith(public):
            name = anonymous + name.removeprefix(public)
    for public in WITHIN:
        name = name.replace(public, PUBLIC[public])
    return name
