"""ROUGE-L and exact match against their definition, and their mean and deviation."""

import random
import re
import string

import pytest
from nltk.stem.porter import PorterStemmer
from rouge_score.rouge_scorer import RougeScorer

from dskd.evaluation.scores import normalize, score, summary

STEMMER = PorterStemmer()
TEXT = (
    "the The cats, ran running quickly to 3 3.5 o'clock re-run -- Zürich 東京 naïve U.S.A. (a) an A! it's its "
    'hopping hop skies sky... dies\tagreed\nhigh-end "quoted" \u00a0 \u2019s _under_score 100% &amp; I'
)
WORDS = TEXT.split(" ")


def plain_words(text: str) -> list[str]:
    """Runs of ASCII letters and digits in lower case; those of more than three stemmed."""
    return [STEMMER.stem(word) if len(word) > 3 else word for word in re.findall("[a-z0-9]+", text.lower())]


def plain_rougel(answer: str, reference: str) -> float:
    """Harmonic mean of the shares that the longest common subsequence is of both."""
    found, wanted = plain_words(answer), plain_words(reference)
    longest = [[0] * (len(wanted) + 1) for _ in range(len(found) + 1)]
    for i, word in enumerate(found):
        for j, other in enumerate(wanted):
            best = max(longest[i][j + 1], longest[i + 1][j])
            longest[i + 1][j + 1] = longest[i][j] + 1 if word == other else best
    common = longest[-1][-1]
    return 2 * common / (len(found) + len(wanted)) if common else 0.0


def plain_exact(answer: str, reference: str) -> bool:
    """As SQuAD compares, but with articles: lower case, without ASCII punctuation, spaces made one."""
    both = []
    for text in (answer, reference):
        kept = "".join(character for character in text.lower() if character not in string.punctuation)
        both.append(re.sub(r"\s+", " ", kept).strip())
    return both[0] == both[1]


def made_up(rng: random.Random) -> tuple[str, list[str]]:
    """An answer and one to four references, some of them nearly the same."""
    answer = " ".join(rng.choices(WORDS, k=rng.randrange(12)))
    references = [" ".join(rng.choices(WORDS, k=rng.randrange(1, 12))) for _ in range(rng.randrange(1, 5))]
    if rng.random() < 0.4:
        near = answer.upper() if rng.random() < 0.5 else answer.replace(" ", "  ").replace(",", ";") + "."
        references.insert(rng.randrange(len(references) + 1), near)
    return answer, references


def test_scores_of_a_thousand_made_up_pairs_are_those_of_the_definition():
    rng, scorer = random.Random(1), RougeScorer(["rougeL"], use_stemmer=True)
    pairs = [made_up(rng) for _ in range(1000)]
    found = [score(answer, references, scorer) for answer, references in pairs]
    for (answer, references), (rougel, exact) in zip(pairs, found, strict=True):
        assert rougel == pytest.approx(100 * max(plain_rougel(answer, reference) for reference in references), abs=1e-9)
        assert exact == 100.0 * any(plain_exact(answer, reference) for reference in references)
    assert sum(len(references) > 1 for _, references in pairs) > 500
    assert 100 < sum(exact == 100 for _, exact in found) < 900
    assert sum(0 < rougel < 100 for rougel, _ in found) > 300


def test_the_best_of_several_references_counts():
    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    # Longest common subsequence "the cat run" (stemmed) of 4 and 3 words: precision 3/4, recall 1.
    assert score("the big cat runs", ["dogs", "the cat running"], scorer) == (pytest.approx(100 * 6 / 7), 0.0)
    assert score("  The CAT! ", ["a dog", "the cat."], scorer) == (100.0, 100.0)
    assert score("", ["a"], scorer) == (0.0, 0.0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [(" It's  a\nTEST. ", "its a test"), ("(A-b)", "ab"), ("...", ""), ("Zürich, 東京", "zürich 東京")],
)
def test_normalized_text(text, expected):
    assert normalize(text) == expected


def test_mean_and_deviation_over_seeds():
    found = summary([(10.0, 0.0), (20.0, 50.0)])
    assert found["rougel"] == {"mean": 15.0, "deviation": pytest.approx(7.0710678), "by_seed": [10.0, 20.0]}
    assert found["exact_match"]["mean"] == 25.0
    assert summary([(10.0, 0.0)])["rougel"]["deviation"] == 0.0
