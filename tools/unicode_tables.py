"""Write the Unicode facts that the pre-tokenizers and normalizers need.

csrc/bpe/unicode_data.h: the general categories of Unicode 16.0.0, because tiktoken 0.14 and tokenizers 0.23 classify
every code point as that version does (tests/tokenizer/test_encode.py holds each against them). They come from the
package `unicodedata2`, whose releases carry the Unicode version as their number:

    pip install unicodedata2==16.0.0
    python tools/unicode_tables.py categories > csrc/bpe/unicode_data.h

fastformer/tokenizer/unassigned.py: the code points without a character in Unicode 9.0.0. tokenizers 0.23 normalizes
as of that version, so whatever came later must pass its NFC, NFD, NFKC and NFKD untouched. CPython 3.6 carries it:

    python3.6 tools/unicode_tables.py unassigned > fastformer/tokenizer/unassigned.py
"""

import sys
import unicodedata

VERSION = "16.0.0"
CATEGORIES = [
    "Cn",
    "Lu",
    "Ll",
    "Lt",
    "Lm",
    "Lo",
    "Mn",
    "Mc",
    "Me",
    "Nd",
    "Nl",
    "No",
    "Pc",
    "Pd",
    "Ps",
    "Pe",
    "Pi",
    "Pf",
    "Po",
    "Sm",
    "Sc",
    "Sk",
    "So",
    "Zs",
    "Zl",
    "Zp",
    "Cc",
    "Cf",
    "Cs",
    "Co",
]
# White_Space is a property of its own, stable since Unicode 6.3; `\s` means exactly this in both references.
WHITE_SPACE = [
    *range(0x9, 0xE),
    0x20,
    0x85,
    0xA0,
    0x1680,
    *range(0x2000, 0x200B),
    0x2028,
    0x2029,
    0x202F,
    0x205F,
    0x3000,
]


def runs(database) -> list:  # type: ignore[no-untyped-def, type-arg]
    """Every change of category as `first code point << 5 | category`."""
    out = []
    last = -1
    for point in range(0x110000):
        category = CATEGORIES.index(database.category(chr(point)))
        if category != last:
            out.append(point << 5 | category)
            last = category
    return out


def block(name: str, kind: str, values: list) -> list:  # type: ignore[type-arg]
    lines = [f"inline constexpr {kind} {name}[{len(values)}] = {{"]
    for i in range(0, len(values), 16):
        lines.append("    " + ",".join(f"0x{v:x}" for v in values[i : i + 16]) + ",")
    return [*lines, "};"]


def unassigned() -> None:
    if unicodedata.unidata_version != "9.0.0":
        sys.exit(f"need an interpreter with Unicode 9.0.0 (CPython 3.6), got {unicodedata.unidata_version}")
    gaps = [p for p in range(0x110000) if unicodedata.category(chr(p)) == "Cn"]
    ranges = []
    for point in gaps:
        if ranges and ranges[-1][1] == point - 1:
            ranges[-1][1] = point
        else:
            ranges.append([point, point])
    text = " ".join(f"{a:x}-{b:x}" if a != b else f"{a:x}" for a, b in ranges)
    print('"""Code points without a character in Unicode 9.0.0, written by tools/unicode_tables.py; do not edit."""\n')
    print("RANGES = (")
    while text:
        cut = len(text) if len(text) <= 110 else text.rindex(" ", 0, 110) + 1
        print(f'    "{text[:cut]}"')
        text = text[cut:]
    print(")")


def categories() -> None:
    import unicodedata2

    if unicodedata2.unidata_version != VERSION:
        sys.exit(f"need unicodedata2=={VERSION}, got {unicodedata2.unidata_version}")
    lines = [
        f"// Unicode {VERSION}, written by tools/unicode_tables.py; do not edit.",
        "#pragma once",
        "#include <cstdint>",
        "",
        "namespace fastformer::unicode {",
        f'inline constexpr char kVersion[] = "{VERSION}";',
        "enum Category : uint8_t { " + ", ".join(CATEGORIES) + " };",
        "// First code point of each run of one general category << 5 | category.",
        *block("kCategoryRuns", "uint32_t", runs(unicodedata2)),
        *block("kWhiteSpace", "uint32_t", WHITE_SPACE),
        "}  // namespace fastformer::unicode",
    ]
    print("\n".join(lines))


if __name__ == "__main__":
    {"categories": categories, "unassigned": unassigned}[sys.argv[1]]()
