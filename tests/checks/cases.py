"""Every finding about the machine: a pattern that raises it, its message, its place, and the pattern put right."""

from __future__ import annotations

from dataclasses import dataclass

RANK = "rank = softmax(dot(compress(16)))"


@dataclass(frozen=True)
class Case:
    """`wrong` stands in `text` at the place of the finding, or is a part of it; `right` in its stead puts it right."""

    code: str
    text: str
    wrong: str
    right: str
    message: str
    target: str | None = None
    applied: bool = True  # whether a hint of the finding writes `right`
    place: str | None = None  # where it is not around `wrong`

    @property
    def fixed(self) -> str:
        assert self.text.count(self.wrong) == 1, self.wrong
        return self.text.replace(self.wrong, self.right)


def pattern(body: str) -> str:
    return f"pattern demo {{ causal {body} }}"


CASES = (
    Case(
        "W501",
        pattern(f"heads query = 40, kv = 8 {RANK} return attend(top_k(4, score = rank, unit = max(64)))"),
        "kv = 8", "kv = 10",
        "5 query heads share a list, in tiles with room for 8: 37.5% of the rows are empty",
    ),
    Case(
        "W502",
        pattern(f"param block = 48 {RANK} return attend(top_k(4, score = rank, unit = max(block)))"),
        "48", "64",
        "units of 48 tokens are walked in blocks of 16: 3 steps for each, where 64 tokens take 1",
        place="max(block)",
    ),
    Case(
        "W502",
        pattern(f"{RANK} return attend(top_k(4, score = rank, unit = max(80)))"),
        "80", "64",
        "units of 80 tokens are walked in blocks of 16: 5 steps for each, where 64 tokens take 1",
    ),
    Case(
        "W503",
        pattern(f"expect(page = 64) {RANK} return attend(top_k(4, score = rank, unit = max(32)))"),
        "page = 64", "page = 32",
        "a unit of 32 tokens touches 1 page of 64 on average: 2 times its tokens",
        place="max(32)",
    ),
    Case(
        "W503",
        pattern(f"expect(page = 64) allow(W502) {RANK} return attend(top_k(4, score = rank, unit = max(96)))"),
        "max(96)", "max(128)",
        "a unit of 96 tokens touches 2 pages of 64 on average: 1.33 times its tokens",
    ),
    Case(
        "W504",
        pattern("tiles = given(unit = 16, rows = 64) return attend(tiles)"),
        "unit = 16", "unit = 64",
        "a unit of 64 x 16 that is listed alone costs 8 times its pairs",
    ),
    Case(
        "W504",
        pattern("return attend(random(2, unit = 64, rows = 16))"),
        "rows = 16", "rows = 64",
        "a unit of 16 x 64 that is listed alone costs 8 times its pairs",
    ),
    Case(
        "W505",
        pattern("heads query = 32, kv = 2 expect(length = 65536) rank = softmax(dot(compress(64))) "
                "return attend(top_k(16, score = rank, share = head))"),
        "share = head", "share = group",
        "each of 16 query heads chooses 16 units of a kv head, which loads up to 228.1 of them at a decode step: "
        "14.3 times a shared list",
    ),
    Case(
        "W506",
        pattern("dim qk = 64, v = 24 return attend(all)"),
        "24", "32",
        "a head dim of 24 is computed as 32 = 32: 25.0% of the columns are zeros",
    ),
    Case(
        "W506",
        pattern("far = stream(qk = 72) return attend(far)"),
        "72", "80",
        "a head dim of 72 is computed as 64 + 16 = 80: 10.0% of the columns are zeros",
    ),
    Case(
        "W507",
        pattern("dim qk = 320 return attend(all)"),
        "320", "256",
        "no configuration is known for a head dim of 320: its kernels run in tiles of 16 x 16",
        applied=False,
    ),
    Case(
        "W508",
        pattern(f"{RANK} return attend(top_k(300, score = rank, unit = max(64)))"),
        "300", "128",
        "lists of 300 units are longer than the 128 that a kernel ranks: all scores go through memory",
    ),
    Case(
        "W509",
        pattern("heads query = 8, kv = 2 expect(length = 65536, batch = 4) allow(W510) chosen = threshold(0.1, "
                "softmax(dot(compress(64)))) return attend(chosen)"),
        "softmax(dot(compress(64))))", "softmax(dot(compress(64))), most = 128)",
        "the lists of `chosen` have room for every unit: 2 GiB of numbers",
    ),
    Case(
        "W511",
        pattern("heads query = 64, kv = 1 dim qk = 576, v = 512 allow(W507) rank = softmax(dot(compress(64))) "
                "return attend(top_k(4, score = rank))"),
        "qk = 576, v = 512 allow(W507)", "qk = 128, v = 128",
        "of `attend`",
        "h200", applied=False,
    ),
    Case(
        "W512",
        pattern("expect(page = 16) return attend(sliding(4096))"),
        "16", "64",
        "pages of 16 tokens make blocks of 16 keys: 4 steps in place of one, each with its own load of the page's "
        "number",
    ),
    Case(
        "W513",
        pattern("expect(length = 2000) allow(W510) rank = softmax(dot(compress(64))) "
                "return attend(top_k(32, score = rank))"),
        "top_k(32", "top_k(16",
        "`top_k` chooses 32 of 32 units at 2,000 tokens: all of them",
        applied=False,
    ),
    Case(
        "E521",
        pattern("expect(length = 65536) return attend(where(q * k < 400000))"),
        "where(q * k < 400000)", "where((q // 64) * (k // 64) < 100)",
        "`k*q` reaches 4,294,836,225 at 65,536 tokens, above the 2,147,483,647 of 32 bits",
        applied=False,
    ),
    Case(
        "E521",
        pattern("heads query = 16, kv = 16 expect(length = 65536) allow(W504) "
                "return attend(given(unit = 4, rows = 4))"),
        "given(unit = 4, rows = 4)", "given(unit = 8, rows = 8)",
        "the map of `given` has 4,294,967,296 entries at 65,536 tokens, above the 2,147,483,647 of 32 bits",
        applied=False,
    ),
    Case(
        "E521",
        pattern("heads query = 16, kv = 1 expect(length = 1024 * 1024, batch = 64) allow(W505) "
                "rank = softmax(dot(compress(64))) return attend(top_k(64, score = rank, share = head))"),
        "batch = 64", "batch = 1",
        "the backward of `attend` has 68,719,476,736 (tile, unit) pairs for a kv head at 1,048,576 tokens, above the "
        "2,147,483,647 of 32 bits",
        applied=False, place="top_k(64, score = rank, share = head)",
    ),
    Case(
        "E522",
        pattern("heads query = 256, kv = 1 dim qk = 128, v = 128 rank = softmax(dot(compress(64))) "
                "return attend(top_k(4, score = rank))"),
        "query = 256", "query = 16",
        "bytes of shared memory, a block of rtx4090 has 101,376",
        "rtx4090", applied=False,
    ),
)  # fmt: skip
