"""A tokenizer of others, used as it is: a folder, a file, or a name on the Hugging Face hub.

Its special tokens are known by their roles, not by their names. The roles come from the tokens that
it puts around a text, its settings, or usual names, and are saved in its post-processor.
"""

from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from files.disk import read_json, reading
from files.model_folder import TOKENIZER_FILES, download, read_tokenizer
from files.tokenizer import SPECIAL_TOKENS

SETTINGS = ("tokenizer_config.json", "special_tokens_map.json")
HUB_FILES = (*SETTINGS, *TOKENIZER_FILES, "merges.txt")


def open_tokenizer(name: str) -> Tokenizer:
    """Read a tokenizer, and add the special tokens and the post-processor that it lacks."""
    path = Path(name) if Path(name).exists() else download(Path(name), HUB_FILES)
    tokenizer = read_tokenizer(path)
    with reading(path):
        special = [t.content for t in tokenizer.get_added_tokens_decoder().values() if t.special]
        roles = _find_roles(tokenizer, special, path if path.is_dir() else path.parent)

    missing = {role: token for role, token in roles.items() if tokenizer.token_to_id(token) is None}
    if missing:
        print(f"{path}: added {', '.join(f'{token} as {role}' for role, token in missing.items())}")
    tokenizer.add_special_tokens([token for token in roles.values() if token not in special])
    n_separators = max(1, tokenizer.num_special_tokens_to_add(is_pair=True) - 2)
    second = int(n_separators == 1)  # RoBERTa has two separators, and no token types
    tokenizer.post_processor = TemplateProcessing(
        single="cls $A sep",
        pair=["cls", "$A", *["sep"] * n_separators, f"$B:{second}", f"sep:{second}"],
        special_tokens=[
            {"id": role, "ids": [tokenizer.token_to_id(token)], "tokens": [token]}
            for role, token in roles.items()
        ],
    )
    return tokenizer


def _find_roles(tokenizer: Tokenizer, special: list[str], folder: Path) -> dict[str, str]:
    """The token of each role of SPECIAL_TOKENS; where no token has it, BERT's name for it."""
    config, special_tokens_map = (read_json(folder / name) for name in SETTINGS)
    tokens = {
        name.removesuffix("_token"): value["content"] if isinstance(value, dict) else value
        for name, value in (config | special_tokens_map).items()
        if value and name.endswith("_token")
    }
    around = tokenizer.encode("").tokens
    if len(around) == 2:
        tokens["cls"], tokens["sep"] = around
    tokens = {"cls": tokens.get("bos"), "sep": tokens.get("eos")} | tokens  # as GPT-2 has them
    return {
        role: tokens.get(role) or next((token for token in special if role in token.lower()), usual)
        for role, usual in SPECIAL_TOKENS.items()
    }
