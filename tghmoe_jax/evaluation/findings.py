"""Findings that an English CT report asserts: name, side and lobe of each, by rules over clauses.

What is denied, doubted, recalled or asked about is not asserted; "likely" and "consistent with" assert. The rules know
the names below and no others. Their error rate on sentences that they were not developed on: docs/evaluation.md.
"""

import functools
import re
from collections.abc import Iterator

Finding = tuple[str, str, str]  # name, side (right, left or empty), lobe or pole (upper, middle, lower or empty)

MOST = 2**15  # characters of a text that are read

_NAMED = {
    "ground-glass opacity": r"ground[- ]glass",
    "consolidation": r"consolidati\w+",
    "atelectasis": r"atelecta\w+",
    "emphysema": r"emphysem\w+",
    "bronchiectasis": r"bronchiecta\w+",
    "fibrosis": r"fibro(?:sis|tic)|honeycomb\w*|scarring|sequelae?",
    "septal thickening": r"septal thickening|thickening of (?:the )?(?:interlobular )?sept\w+",
    "bronchial wall thickening": r"(?:peri)?bronchial (?:wall )?thickening|thickening of (?:the )?bronchial walls?"
    r"|bronchial walls? (?:is|are) thickened",
    "mosaic attenuation": r"mosaic",
    "pericardial effusion": r"pericardial (?:effusions?|fluid)",
    "pleural effusion": r"(?<!pericardial )effusions?|pleural fluid",
    "pleural thickening": r"pleural[- ](?:thickening|plaques?)|effusion-thickening"
    r"|calcified plaques? (?:in|of) the pleura",
    "pneumothorax": r"pneumothora(?:x|ces)",
    "cardiomegaly": r"cardiomegaly|heart (?:size )?(?:is |was )?(?:mildly |moderately )?(?:not )?(?:enlarged|increased)"
    r"|enlarged (?:heart|cardiac)|cardiac enlargement|cardiothoracic (?:index|ratio) (?:has |is )?increased",
    "coronary calcification": r"coronary (?:arter\w+ )?(?:wall )?(?:calcifi\w+|plaques?)"
    r"|(?:calcifi\w+|plaques?)[^;]{0,80}\bcoronary",
    "arterial calcification": r"(?:aort\w+|arteri\w+|vascular|iliac)[^,;]{0,60}(?:calcifi\w+|plaques?)|atherosclero\w+"
    r"|(?:calcifi\w+|plaques?)(?![^,;]{0,20}pleura)[^;]{0,40}\b(?:aort\w+|iliac|carotid)",
    "aneurysm": r"aneurysm\w*",
    "pulmonary embolism": r"embol(?:i|us|ism)\b",
    "lymphadenopathy": r"(?:lymph)?adenopath\w+|(?:enlarged|pathologic\w*) [^,;]{0,40}lymph nodes?"
    r"|lymph nodes? [^;]{0,30}enlarged",
    "hiatal hernia": r"hiat(?:al|us) herni\w+",
    "abdominal hernia": r"(?:umbilical|inguinal|ventral|incisional|abdominal wall) hernias?",
    "medical device": r"catheter|pacemaker|stents?\b|tube\b|\bport\b|wires|surgical clips|prosthe\w+|drains?\b",
    "fracture": r"fractures?|(?:compression|wedge) deformit\w+",
    "fatty liver": r"(?:hepato)?steato(?:sis|tic|z\w+)|fatty (?:liver|infiltration)"
    r"|liver (?:parenchymal )?(?:density|attenuation) (?:is |has )?(?:diffusely )?(?:decreased|reduced)",
    "cirrhosis": r"cirrho(?:sis|tic)",
    "hepatomegaly": r"hepato(?:spleno)?megaly|liver is (?:mildly |moderately )?enlarged|enlarged liver",
    "splenomegaly": r"(?:hepato)?splenomegaly|spleen is (?:mildly |moderately )?enlarged|enlarged spleen",
    "gallstone": r"gallstones?|cholelithiasis|(?:stones?|calcul\w+)[^,;]{0,20}gallbladder"
    r"|gallbladder[^,;]{0,30}stones?",
    "bile duct dilatation": r"(?:biliary|bile ducts?)[^,;]{0,20}(?:dilat\w+|ectasia)|dilat\w+ [^,;]{0,20}bil(?:e|iary)",
    "hydronephrosis": r"hydro(?:uretero)?nephrosis",
    "kidney stone": r"nephrolithiasis|(?:renal|kidney) (?:stones?|calcul\w+)|(?:stones?|calcul\w+)[^,;]{0,40}kidneys?"
    r"|kidneys?[^;]{0,40}\b(?:stones?|calcul\w+)",
    "pancreatitis": r"pancreatitis",
    "ascites": r"ascites|free (?:intraperitoneal |intra-abdominal )?fluid",
    "free air": r"free (?:intraperitoneal |intra-abdominal )?air|pneumoperitoneum",
    "diverticulosis": r"diverticul(?:osis|a|um)\b",
    "appendicitis": r"appendicitis",
    "bowel obstruction": r"(?:bowel|intestinal) obstruction|obstructed bowel",
    "opacity": r"(?<!glass )(?:opacit\w+|infiltrat(?:es?|ion)\b)",
}  # fmt: skip
_LESION = (
    r"nodul(?:e|es|arity)\b|granulomas?|mass(?:es)?\b|lesions?|metastas[ie]s|hypodensit\w+|adenomas?|cysts?\b"
    r"|tumou?rs?"
)
_ORGANS = {
    "thyroid": r"thyroid",
    "mediastinal": r"mediastin\w+",
    "liver": r"liver|hepatic",
    "kidney": r"kidneys?|renal|cortical cysts?",
    "adrenal": r"adrenals?",
    "pancreas": r"pancrea\w+",
    "bone": r"bones?|vertebra\w*|osseous|skelet\w+|sacrum|femur|lytic|sclerotic",
    "spleen": r"spleen|splenic",
    "lung": r"lungs?\b|pulmonary|subpleural|hil(?:um|ar)|(?:upper|middle|lower) lobes?|lingula\w*|\b[rl][uml]l\b",
}
_FINDING = re.compile("|".join(rf"\b(?P<f{i}>{p})" for i, p in enumerate([*_NAMED.values(), _LESION])))
_ORGAN = re.compile("|".join(rf"\b(?P<{name}>{pattern})" for name, pattern in _ORGANS.items()))

# What says that nothing changed denies nothing.
_UNCHANGED = re.compile(
    r"\b(?:no|without)(?: significant| interval| appreciable| definite)* (?:changes?|increase|growth|progression"
    r"|differences?)(?: in| of)?\b|\bnot (?:significantly |appreciably )?(?:changed|increased|grown|progressed)"
    r"|\bnot only\b"
)
_CLAUSE = re.compile(
    r";|:|\b(?:but|however|although|though|whereas|while|except(?: for)?|apart from|yet)\b|\band there (?:is|are)\b"
)
# Denied or doubted from here to the end of the clause ...
_FORWARD = re.compile(
    r"\b(?:no|not|without|free of|negative for|absence of|neither|nor|never|lacks?|resolution of|rules? out|exclude"
    r"|possibl[ey]|may|might|could|questionable|question of|suspected|suspicion (?:of|for)|suspicious for"
    r"|concern(?:ing)? for|history of|status post|s/p|if|whether|evaluat\w+ for)\b"
)
# ... to the next comma ...
_TO_COMMA = re.compile(r"\b(?:rather than|instead of)\b[^,]*")
# ... from the start of the clause to here ...
_BACKWARD = re.compile(
    r"\b(?:(?:is|are|was|were|has|have|can|could)(?: been)? (?:also )?not\b|(?:is|are|was|were) absent|cannot be"
    r"|(?:has|have)(?: completely| largely)? resolved|(?:is|are) suspected|surgically absent|follow-up$)"
)
_NOWHERE = re.compile(r"\bno longer\b|\b(?:versus|vs\.?)(?= )")  # ... or in the whole clause.

_NO_PLACE = re.compile(
    r"\b(?:right|left)(?: upper| lower)? (?:quadrant|heart|atri\w+|ventric\w+|main)\b|\bupper (?:limit|abdom\w+|normal)"
    r"|(?:right|left) (?:greater|more|less) than (?:right|left)\b|\bboth main bronch\w+"
)
_PLACE = re.compile(
    r"\b(?:(?P<side>right|left|bilateral(?:ly)?|both|either|bi(?=basilar|basal|apical))"
    r"|(?P<lobe>upper|middle|lower)(?= (?:lung )?(?:lobe|pole|zone)s?\b)|(?P<lingula>lingula\w*)"
    r"|(?P<short>[rl][uml]l\b))"
)
_SHARED = re.compile(r"\b(upper|middle|lower) and (right |left )?(upper|middle|lower) (lobe|pole|zone)(s?)\b")
_LOBES = {"u": "upper", "m": "middle", "l": "lower"}


def stated(text: str) -> frozenset[Finding]:
    """The findings that a text asserts. A bilateral one is two; one that names no side or lobe has empty ones."""
    return frozenset(_stated(text))


@functools.lru_cache(maxsize=1 << 14)  # the metrics of a report each ask for its findings
def _stated(text: str) -> tuple[Finding, ...]:
    found: set[Finding] = set()
    for sentence in re.split(r"(?<=[.!?])\s+|\n", text[:MOST].lower()):
        if sentence.rstrip().endswith("?"):
            continue
        found |= _of_sentence(_UNCHANGED.sub(" ", _NO_PLACE.sub(" ", sentence.rstrip(". "))))
    return tuple(found)


def _of_sentence(sentence: str) -> set[Finding]:
    found: set[Finding] = set()
    organ = next((match.lastgroup for match in _ORGAN.finditer(sentence)), "lung")
    for clause in _CLAUSE.split(_SHARED.sub(r"\1 \4 and \2\3 \4\5", sentence)):
        if not _NOWHERE.search(clause):
            found |= set(_of_clause(clause, organ))
    names = {name for name, _, _ in found}
    # A lesion that is called a cyst, and an opacity that is called something else, are one finding.
    general = {f"{kind} lesion" for kind in _ORGANS if f"{kind} cyst" in names}
    general |= {"opacity"} if names & {"atelectasis", "consolidation"} else set()
    placed = {name for name, *place in found if any(place)}  # beside these, a mention without a place adds nothing
    return {one for one in found if one[0] not in general and (any(one[1:]) or one[0] not in placed)}


def _of_clause(clause: str, organ: str) -> Iterator[Finding]:
    """The findings of a clause, each with the places that stand by it; `organ` is the sentence's first."""
    mentions = [match for match in _FINDING.finditer(clause)]
    regions, organs = _regions(clause, mentions), list(_ORGAN.finditer(clause))
    denied = [range(match.start(), len(clause)) for match in _FORWARD.finditer(clause)]
    denied += [range(*match.span()) for match in _TO_COMMA.finditer(clause)]
    denied += [range(match.start() + 1) for match in _BACKWARD.finditer(clause)]
    for mention, places in zip(mentions, regions, strict=True):
        if any(mention.start() in span for span in denied):
            continue
        name = _name(mention, organs, organ)
        for side, lobe in places or [("", "")]:
            yield name, side, lobe


def _name(mention: re.Match, organs: list[re.Match], organ: str) -> str:
    """The name of a mention; a lesion is that of the nearest of `organs`, else of `organ`."""
    number = int(mention.lastgroup[1:])
    if number < len(_NAMED):
        return list(_NAMED)[number]
    near = [(max(one.start() - mention.end(), mention.start() - one.end()), one) for one in organs]
    organ = min(near, key=lambda pair: pair[0])[1].lastgroup if near else organ
    word = mention[0]
    if organ == "lung":
        return "lung nodule" if word.startswith(("nodul", "granul", "metast")) else "lung mass"
    if organ == "mediastinal":
        return "mediastinal mass"
    if word.startswith("cyst") and organ in ("liver", "kidney"):
        return f"{organ} cyst"
    return "thyroid nodule" if organ == "thyroid" else f"{organ} lesion"


def _regions(clause: str, mentions: list[re.Match]) -> list[list[tuple[str, str]]]:
    """The places of each mention: before it as an adjective, or after it; coordinated ones share theirs."""
    if len(mentions) == 1:
        return [_places(clause)]
    own = []
    for i, mention in enumerate(mentions):
        low = mentions[i - 1].end() if i else 0
        high = mentions[i + 1].start() if i + 1 < len(mentions) else len(clause)
        before, after = clause[low : mention.start()], clause[mention.end() : high]
        if i:  # what a preposition leads belongs to the mention before, an adjective to this one
            before = re.split(r"\b(?:in|at|of|on|along|within)\b|,", before)[-1] if "and" not in before else before
            before = re.split(r"\band\b|\bwith\b|,", before)[-1]
        if i + 1 < len(mentions):
            parts = re.split(r",|\band\b|\bwith\b", after)
            after = after if len(parts) == 1 and re.match(r" (?:in|at|of|on|along|within) ", after) else parts[0]
        own.append(_places(f"{before} | {after}"))
    for i in reversed(range(len(mentions) - 1)):  # "effusion and atelectasis in the left lower lobe"
        between = clause[mentions[i].end() : mentions[i + 1].start()]
        if not own[i] and re.fullmatch(r"[\w ]{0,15}(?:,|\band\b|\bor\b|\bwith\b)[\w ]{0,25}", between):
            own[i] = own[i + 1]
    for i in range(1, len(mentions)):
        own[i] = own[i] or own[i - 1]
    return own


def _places(text: str) -> list[tuple[str, str]]:
    """(side, lobe) pairs: a lobe takes the side before it, else the one after ("lower lobes of both lungs")."""
    sides: list[tuple[int, tuple[str, ...]]] = []
    lobes: list[tuple[int, str]] = []
    pairs: list[tuple[str, str]] = []
    for match in _PLACE.finditer(text):
        word = match[0]
        if match["side"]:
            sides.append((match.start(), (word,) if word in ("right", "left") else ("right", "left")))
        elif match["lobe"]:
            lobes.append((match.start(), word))
        elif match["lingula"]:
            pairs.append(("left", "upper"))
        else:
            pairs.append(({"r": "right", "l": "left"}[word[0]], _LOBES[word[1]]))
    for place, lobe in lobes:
        before = [of for start, of in sides if start < place]
        after = [of for start, of in sides if start > place]
        pairs += [(side, lobe) for side in (before[-1] if before else after[0] if after else ("",))]
    if not pairs:
        pairs = [(side, "") for _, of in sides for side in of]
    return list(dict.fromkeys(pairs))
