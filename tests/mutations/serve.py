"""Faults in who may use the server, in its batches, and in what is taught."""

from tests.mutations import Mutation

ACCESS, ENGINE, API, TEACH = (f"tests/serve/test_{name}.py::test_" for name in ("access", "engine", "api", "teach"))

SERVE = (
    Mutation(
        "the server answers by any name",
        "if self.hosts is not None and host.lower() not in self.hosts:",
        "if False:",
        (ACCESS + "from_elsewhere_nobody_gets_in_even_with_the_token",),
    ),
    Mutation(
        "another page uses the server",
        'if origin is not None and origin.lower() != f"http://{host.lower()}":',
        "if False:",
        (ACCESS + "from_elsewhere_nobody_gets_in_even_with_the_token",),
    ),
    Mutation(
        "every token opens the server",
        'return secrets.compare_digest(text.encode("utf-8", "replace"), self.token.encode())',
        "return bool(text)",
        (ACCESS + "another_token_opens_nothing",),
    ),
    Mutation(
        "a body without a length may be of any size",
        "if self.left < 0:",
        "if False:",
        (ACCESS + "a_request_that_is_too_large_is_refused",),
    ),
    Mutation(
        "requests of two kinds are one batch",
        "if following.kind == first.kind:",
        "if True:",
        (ENGINE + "images_of_other_sizes_and_texts_are_batches_of_their_own",),
    ),
    Mutation(
        "a part of a query is never taken away",
        "parts.append((part.weight, vector))",
        "parts.append((abs(part.weight), vector))",
        (API + "search_finds_by_words_by_an_image_and_by_both",),
    ),
    Mutation(
        "an address counts as an image",
        'if not (head.startswith("data:image/") and head.endswith(";base64")):',
        "if not address:",
        (API + "what_cannot_be_embedded_is_said",),
    ),
    Mutation(
        "what is undone stays written",
        "            self._set(self._steps.pop())\n            self._write()",
        "            self._set(self._steps.pop())",
        (TEACH + "nothing_is_lost_when_the_server_ends",),
    ),
)
