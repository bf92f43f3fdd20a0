"""Small data sets in the layouts of the published ones, for every test that reads data from files.

Each builder fills a folder and returns the `data` section that opens it. The volumes are the synthetic patient of
`ct_fixtures`, each a little different, so that none is a duplicate of another.
"""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from tests.scans.ct_fixtures import SECRET, axes_of, patient, write_nifti

SPACING = (3.0, 1.5, 1.5)
M3D_COLUMNS = [
    "Image Path", "Text", "Question Type", "Question", "Choice A", "Choice B", "Choice C", "Choice D", "Answer",
    "Answer Choice",
]  # fmt: skip
LABELS = ["Cardiomegaly", "Lung nodule", "Pleural effusion"]


def body(number: int, shape: tuple[int, int, int] = (12, 36, 44)) -> np.ndarray:
    """The patient in HU int16 with a mark of its own."""
    hu = patient(shape)
    hu[2 + number % (shape[0] - 4), shape[1] // 2 : shape[1] // 2 + 3, 8 + number % 20] = 300 + 7 * number
    return hu


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Sequence]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([columns, *rows])
    return path


def write_json(path: Path, value) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


# ------------------------------------------------------------------------------------------------------------ M3D


def m3d_questions(image: str, report: str) -> list[list]:
    """The nine rows of an image: one question each of types 1 to 3, three each of 4 and 5."""
    rows = [
        [image, report, 1, "Which plane is shown?", "Sagittal", "Axial", "Coronal", "NA", "Axial", "B"],
        [image, report, 2, "Which phase?", "Non-contrast", "Arterial", "NA", "NA", "Non-contrast", "A"],
        [image, report, 3, "Which organ is affected?", "Liver", "Lung", "Spleen", "Kidney", "Lung", "B"],
    ]
    for number in range(3):
        asked = f"What is seen in region {number}?"
        rows.append([image, report, 4, asked, "A nodule", "A cyst", "A stone", "No lesion", "A stone", "C"])
    for number in range(3):
        asked = f"Where is lesion {number}?"
        rows.append([image, report, 5, asked, "Left lung", "Right lung", "Liver", "Spleen", "Spleen", "D"])
    return rows


def write_m3d(root: Path, shape: tuple[int, ...] = (1, 8, 32, 32)) -> dict:
    """M3D-Cap and M3D-VQA as published: the JSON of splits, prepared .npy volumes with their texts, the CSVs."""
    cases = {
        "train": ["ct_case/000006/Axial_non_contrast", "ct_quizze/000007/Axial_C__portal_venous_phase"],
        "validation": ["ct_case/000011/Axial_bone_window"],
        "test": ["ct_case/000006/Coronal_non_contrast", "ct_quizze/012518/Axial_C__portal_venous_phase"],
    }
    splits: dict[str, list[dict]] = {}
    rows: dict[str, list[list]] = {}
    for split, names in cases.items():
        for number, name in enumerate(names):
            image, text = f"M3D_Cap_npy/{name}.npy", f"M3D_Cap_npy/{Path(name).parent}/text.txt"
            path = root / image
            path.parent.mkdir(parents=True, exist_ok=True)
            values = np.random.default_rng([len(split), number]).random(shape, np.float32)
            np.save(path, values)
            report = f"A small nodule in case {path.parent.name}."
            (root / text).write_text(report)
            splits.setdefault(split, []).append({"image": image, "text": text})
            rows.setdefault(split, []).extend(m3d_questions(image, report))
    splits["test1k"] = splits["test500"] = splits["test100"] = splits["test"][:1]
    splits["hard_test"] = splits["test"][1:]
    write_json(root / "M3D_Cap_npy" / "M3D_Cap.json", splits)
    for split, file in (("train", "train"), ("validation", "val"), ("test", "test")):
        write_csv(root / "M3D-VQA" / f"M3D_VQA_{file}.csv", M3D_COLUMNS, rows[split])
    write_csv(root / "M3D-VQA" / "M3D_VQA_test5k.csv", M3D_COLUMNS, rows["test"][:5])
    image = splits["train"][0]["image"]
    write_csv(
        root / "M3D-VQA" / "M3D_VQA_yn_train.csv",
        ["Image Path", "Text", "Question Type", "Question", "Answer"],
        [[image, "text", 4, "Is there a nodule?", "Yes"], [image, "text", 4, "Is there a stone?", "No."]],
    )
    return {"name": "m3d", "root": str(root), "manifest": ""}


# -------------------------------------------------------------------------------------------------------- CT-RATE


def ct_rate_volume(root: Path, name: str, number: int = 0, twice: bool = False, raw: bool = False) -> Path:
    """A volume in its place: HU as version 2 stores them, or rescaled a second time, or never (`raw`)."""
    split, patient_, scan, _ = name.removesuffix(".nii.gz").split("_")
    folder = root / "dataset" / f"{split}_fixed" / f"{split}_{patient_}" / f"{split}_{patient_}_{scan}"
    folder.mkdir(parents=True, exist_ok=True)
    hu = body(number).astype(np.int16)
    return write_nifti(folder / name, hu - 1024 if twice else hu + 1024 if raw else hu, axes_of(SPACING))


def write_ct_rate(root: Path) -> dict:
    """CT-RATE as published, with its traps.

    Version 2 volumes beside a metadata table that still states slope and intercept, spacing as text, the marker of
    texts not given, scans without a chest, questions with task tags, and columns that name sites and scanners.
    """
    train = ["train_1_a_1", "train_1_a_2", "train_2_a_1", "train_3_b_1"]
    valid = ["valid_1_a_1", "valid_2_a_1", "valid_3_a_1", "valid_4_a_1"]
    not_given = "Not given."
    for index, (short, long, names) in enumerate((("train", "train", train), ("valid", "validation", valid))):
        reports, metadata, labels, questions = [], [], [], []
        for number, name in enumerate(names):
            ct_rate_volume(root, f"{name}.nii.gz", 10 * index + number)
            patient_ = name.split("_")[1]
            findings = f"Heart size is normal in patient {patient_}.\nNo effusion."
            reports.append([f"{name}.nii.gz", not_given, "CT", findings, not_given if number == 1 else "Normal chest."])
            metadata.append(
                [f"{name}.nii.gz", f"{SECRET} works", f"{SECRET} site", 12, 36, "[1.5, 1.5]", 3.0, 1, -1024]
            )
            labels.append([f"{name}.nii.gz", number % 2, int(number == 0), 1])
            questions += _ct_rate_conversations(f"{name}.nii.gz", number)
        reports.append([f"{short}_9_a_1.nii.gz", not_given, "CT", not_given, not_given])
        data = root / "dataset"
        write_csv(
            data / "radiology_text_reports" / f"{long}_reports.csv",
            ["VolumeName", "ClinicalInformation_EN", "Technique_EN", "Findings_EN", "Impressions_EN"],
            reports,
        )
        write_csv(
            data / "metadata" / f"{long}_metadata.csv",
            [
                *("VolumeName", "Manufacturer", "InstitutionName", "NumberofSlices", "Rows", "XYSpacing", "ZSpacing"),
                *("RescaleSlope", "RescaleIntercept"),
            ],
            metadata,
        )
        write_csv(data / "multi_abnormality_labels" / f"{short}_predicted_labels.csv", ["VolumeName", *LABELS], labels)
        write_json(data / "vqa" / f"{short}_vqa.json", questions)
        no_chest = data / "metadata" / f"no_chest_{short}.txt"
        no_chest.write_text(f"{short}/{short}_2/{short}_2_a/{short}_2_a_1.nii.gz\n")
    return {"name": "ct_rate", "root": str(root), "manifest": ""}


def _ct_rate_conversations(image: str, number: int) -> list[dict]:
    def entry(kind: str, *turns: tuple[str, str]) -> dict:
        spoken = []
        for place, (asked, said) in enumerate(turns):
            mark = "<image>\n" if place == 0 else ""
            spoken.append({"from": "human", "value": f"{mark}{asked}<{kind}>", "type": kind})
            spoken.append({"from": "gpt", "value": said})
        return {"id": f"{kind}_{number}", "image": image, "conversations": spoken}

    letters = "What is seen? (a) Nodule (b) Effusion (c) Normal lungs (d) Emphysema "
    return [
        entry("long_answer", ("Describe the lungs.", "The lungs are clear."), ("And the heart?", "It is normal.")),
        entry("short_answer", ("Is there an effusion?", "No")),
        entry("multiple_choice", (letters, "(c) Normal lungs")),
        entry("report_generation", ("Write the report.", "Findings: the chest is normal.")),
    ]


# --------------------------------------------------------------------------------------- DeepTumorVQA v2 and 3D-RAD


def tumor_question(number: int, image: str, **changes) -> dict:
    """A question of the benchmark as its card shows one, changed."""
    stem = "How would you classify the splenic enlargement based on volume?"
    return {
        "qid": f"bench_{number:05d}", "image_id": image, "spacing": "[0.83 0.83 5.0]", "shape": "(512, 512, 116)",
        "sex": None, "age": None, "question": stem, "answer": "Normal (no splenomegaly)",
        "mc_question": f"{stem} A: Normal B: Moderate C: Severe D: Mild", "correct_option": "A", "organ": "spleen",
        "lesion": False, "question_type": "medical reasoning", "question_subtype": "splenomegaly grading",
        "requires_tools": ["segment_organ", "measure"],
    } | changes  # fmt: skip


def write_deeptumorvqa(root: Path) -> dict:
    """The benchmark's JSON beside its volumes, and the training table, whose volumes lie as AbdomenAtlas has them."""
    for number, place in ((1, "benchmark/ct/"), (2, "benchmark/ct/"), (3, ""), (4, "")):
        folder = root / f"{place}BDMAP_0000000{number}"
        folder.mkdir(parents=True)
        write_nifti(folder / "ct.nii.gz", body(number).astype(np.int16), axes_of(SPACING))
    volume = {
        "question": "What is the volume of the liver in cm3?", "answer": "1450.2", "correct_option": "B",
        "mc_question": "What is the volume of the liver in cm3?\nA: 1200.0\nB: 1450.2\nC: 1700.5",
        "question_type": "measurement", "question_subtype": "organ volume measurement",
    }  # fmt: skip
    asked = [tumor_question(1, "BDMAP_00000001"), tumor_question(2, "BDMAP_00000002", **volume)]
    write_json(root / "benchmark" / "test_qa.json", {"version": "v4", "num_questions": 2, "questions": asked})
    rows = [tumor_question(3, "BDMAP_00000003"), tumor_question(4, "BDMAP_00000004", **volume)]
    write_csv(root / "train" / "train_qa.csv", list(rows[0]), [list(row.values()) for row in rows])
    return {"name": "deeptumorvqa", "root": str(root), "manifest": ""}


RAD_COLUMNS = [
    "Task", "Subtask", "VolumeName", "Question", "Answer", "QuestionType", "AnswerChoice", "Choice A", "Choice B",
    "Choice C", "Choice D",
]  # fmt: skip


def write_3d_rad(root: Path) -> dict:
    """Open, yes or no and four-way questions, in the folders of their tasks, beside CT-RATE's volumes."""
    lesion = ["Refractory Lesion (Persistent, now present)", "Resolved Lesion", "New Lesion", "No Abnormality"]
    for number, (split, name, real) in enumerate(
        (("train", "train_1_a_1", "train_1_a_1"), ("test", "test_2_b_1", "valid_2_b_1"))
    ):
        name = f"{name}.nii.gz"
        ct_rate_volume(root, f"{real}.nii.gz", 30 + number)
        files = {
            "Task3_Medical_Computation/Thickness": [3, 3, name, "How thick is it?", "1.5 cm", "Open", *"-----"],
            "Task4_Existence_Detection/Hiatal hernia": [
                4, 8, name, "Is hiatal hernia present?", "No", "Close", "B", "Yes", "No", "-", "-",
            ],
            "Task6_Longitudinal_Temporal_Diagnosis/c": [
                6, 1, name, "Sequence history: [0]. What now, at last?", "New Lesion", "Close", "C", *lesion,
            ],
        }  # fmt: skip
        for file, row in files.items():
            write_csv(root / "3DRAD" / split / f"{file}.csv", RAD_COLUMNS, [row])
    return {"name": "3d_rad", "root": str(root), "manifest": ""}


# ---------------------------------------------------------------------------------------- LLaVA JSON and manifest


def write_llava(root: Path) -> dict:
    """Med-2E3's training file (vision3d), MedM-VL's (image3d) and an answers file."""
    files = []
    for number in range(4):
        name = f"volumes/scan{number}.nii.gz"
        (root / "volumes").mkdir(parents=True, exist_ok=True)
        write_nifti(root / name, body(number), axes_of(SPACING))
        files.append(name)
    choices = "Which side? Choices: A. Left B. Right C. Both D. NA"

    def entry(number: int, key: str, asked: str, said: str | None, **more) -> dict:
        spoken = [{"from": "human", "value": f"<image3d>\n{asked}"}]
        spoken += [{"from": "gpt", "value": said}] if said else []
        return {"id": number, "conversations": spoken, key: [files[number]], **more}

    write_json(root / "vqa_train.json", [
        entry(0, "vision3d", "What is seen?", "A nodule.", vision2d=[]),
        entry(1, "vision3d", choices, "B. Right", vision2d=[]),
    ])  # fmt: skip
    write_json(root / "caption_train.json", [entry(2, "image3d", "Please describe the scan.", "The chest is normal.")])
    write_json(root / "vqa_test.json", [
        entry(3, "image3d", choices, None, answer="A. Left", answer_choice="A", question_type=5),
        entry(3, "image3d", "What is seen?", None, answer="A cyst.", question_type=4),
    ])  # fmt: skip
    return {"name": "llava", "root": str(root), "manifest": "vqa_train.json,caption_train.json,vqa_test.json"}


def manifest_line(number: int, **changes) -> dict:
    """A good line of a manifest about scan `number`, changed; a value of None takes the key away."""
    row = {"volume": f"scans/{number}.nii.gz", "question": "Is there a nodule?", "answer": "No", "case": f"c{number}"}
    return {key: value for key, value in (row | changes).items() if value is not None}


def write_lines(path: Path, rows: Sequence) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row, ensure_ascii=False) for row in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def write_manifest(root: Path, cases: int = 4) -> dict:
    """A hospital's own manifest: an open and a closed question and a report for each of `cases` scans."""
    (root / "scans").mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(cases):
        write_nifti(root / "scans" / f"{number}.nii.gz", body(number), axes_of(SPACING))
        split = ("train", "train", "validation", "test")[number % 4]
        rows += [
            manifest_line(number, split=split),
            manifest_line(number, split=split, question="Which side?", answer="left", choices=["left", "right"]),
            manifest_line(
                number, split=split, question="", answer="Findings: none.", task="report", indication="Cough"
            ),
        ]
    write_lines(root / "manifest.jsonl", rows)
    return {"name": "manifest", "root": str(root), "manifest": "manifest.jsonl"}


# ------------------------------------------------------------------------------------------------------- labelmap

STRUCTURES = {
    1: "liver", 2: "spleen", 3: "kidney_left", 4: "kidney_right", 5: "aorta", 6: "vertebrae_L1", 7: "tumour",
    9: "urinary_bladder",
}  # fmt: skip
LABEL_SPACING = (3.0, 2.5, 2.5)


def segmented(number: int, shape: tuple[int, int, int] = (24, 40, 44)) -> tuple[np.ndarray, np.ndarray]:
    """A scan int16 (D, H, W) whose structures stand where chance puts them, 100 HU times their label, and its mask.

    The kidneys keep their sides and the vertebra the middle; a structure is sometimes absent.
    """
    rng = np.random.default_rng([77, number])
    hu, mask = np.full(shape, -1000, np.int16), np.zeros(shape, np.uint8)
    hu[:, 4:-4, 4:-4] = 0
    for value, name in STRUCTURES.items():
        if rng.random() < 0.2 and name != "vertebrae_L1":
            continue
        size = rng.integers(5, 11, 3)
        low = np.array([rng.integers(0, n - s + 1) for n, s in zip(shape, size, strict=True)])
        if name == "vertebrae_L1":
            low[2] = (shape[2] - size[2]) // 2
        if name.startswith("kidney"):
            low[2] = shape[2] * 3 // 4 - 4 if name.endswith("left") else shape[2] // 4 - 4
        box = tuple(slice(a, a + s) for a, s in zip(low, size, strict=True))
        mask[box] = value
    hu[mask > 0] = 100 * mask[mask > 0].astype(np.int16)
    return hu, mask


def write_labelmap(root: Path, cases: int = 10) -> dict:
    """TotalSegmentator's layout: a scan and one binary mask for each structure, empty ones too."""
    for number in range(cases):
        folder = root / f"s{number:04d}"
        (folder / "segmentations").mkdir(parents=True)
        hu, mask = segmented(number)
        write_nifti(folder / "ct.nii.gz", hu, axes_of(LABEL_SPACING))
        for value, name in STRUCTURES.items():
            one = (mask == value).astype(np.uint8)
            write_nifti(folder / "segmentations" / f"{name}.nii.gz", one, axes_of(LABEL_SPACING))
    return {"name": "labelmap", "root": str(root), "manifest": ""}


def write_labelmap_index(root: Path, cases: int = 2, parts: int = 30, split: str = "test") -> dict:
    """Label maps with a table of names and an index, with crops and re-slicings."""
    root.mkdir(parents=True, exist_ok=True)
    write_json(root / "names.json", {str(value): name for value, name in STRUCTURES.items()})
    entries = []
    for number in range(cases):
        hu, mask = segmented(number)
        write_nifti(root / f"scan{number}.nii.gz", hu, axes_of(LABEL_SPACING))
        write_nifti(root / f"mask{number}.nii.gz", mask, axes_of(LABEL_SPACING))
        entries.append(
            {
                "volume": f"scan{number}.nii.gz", "mask": f"mask{number}.nii.gz", "labels": "names.json",
                "case": f"case{number}", "split": split, "parts": parts,
            }
        )  # fmt: skip
    write_json(root / "index.json", entries)
    return {"name": "labelmap", "root": str(root), "manifest": "index.json"}
