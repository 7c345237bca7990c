"""Write csrc/bpe/unicode_data.h: the Unicode facts that the pre-tokenizers and normalizers need.

The version is 16.0.0 because the references are: tiktoken 0.14 and tokenizers 0.23 classify every code point as
Unicode 16.0.0 does (tests/tokenizer/test_unicode.py holds them against the tables). The facts come from the package
`unicodedata2`, whose releases carry the Unicode version as their number:

    pip install unicodedata2==16.0.0
    python tools/unicode_tables.py > csrc/bpe/unicode_data.h
"""

import sys

import unicodedata2

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


def runs() -> list[int]:
    """Every change of category as `first code point << 5 | category`."""
    out: list[int] = []
    last = -1
    for point in range(0x110000):
        category = CATEGORIES.index(unicodedata2.category(chr(point)))
        if category != last:
            out.append(point << 5 | category)
            last = category
    return out


def block(name: str, kind: str, values: list[int]) -> list[str]:
    lines = [f"inline constexpr {kind} {name}[{len(values)}] = {{"]
    for i in range(0, len(values), 16):
        lines.append("    " + ",".join(f"0x{v:x}" for v in values[i : i + 16]) + ",")
    return [*lines, "};"]


def main() -> None:
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
        *block("kCategoryRuns", "uint32_t", runs()),
        *block("kWhiteSpace", "uint32_t", WHITE_SPACE),
        "}  // namespace fastformer::unicode",
    ]
    print("\n".join(lines))


if __name__ == "__main__":
    main()
