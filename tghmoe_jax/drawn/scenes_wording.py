"""How scenes are asked about: `seen` wordings for training, `unseen` ones that training never meets."""

# {x} is a shape as "red shape" or "shape on the left", {k} what a shape contains.
QUESTIONS: dict[str, dict[str, tuple[str, ...]]] = {
    "shape": {
        "seen": (
            "Which shape is the {x}?",
            "What is the {x}?",
            "What form has the {x}?",
            "Name the {x}.",
            "The {x} is which shape?",
        ),
        "unseen": ("What kind of figure is the {x}?", "Tell me the outline of the {x}."),
    },
    "colour": {
        "seen": (
            "Which colour is the {x}?",
            "What colour has the {x}?",
            "What is the colour of the {x}?",
            "Name the colour of the {x}.",
            "The {x} is in which colour?",
        ),
        "unseen": ("How is the {x} painted?", "Tell me the hue of the {x}."),
    },
    "place": {
        "seen": (
            "Where is the {x}?",
            "Where is the {x} located?",
            "In which part is the {x}?",
            "What is the location of the {x}?",
            "Name the place of the {x}.",
        ),
        "unseen": ("At what position can the {x} be found?", "Localise the {x}."),
    },
    "item": {
        "seen": ("Describe the {x}.", "Please describe the {x}.", "Report the {x}."),
        "unseen": ("Tell me everything of the {x}.",),
    },
    "count": {
        "seen": (
            "How many shapes are there?",
            "How many shapes are shown?",
            "What is the number of shapes?",
            "Count the shapes.",
            "How many shapes does the picture show?",
        ),
        "unseen": ("How many figures can you see?", "Give the total of objects."),
    },
    "size": {
        "seen": (
            "How large is the {x}?",
            "What size is the {x}?",
            "What is the size of the {x}?",
            "Name the size of the {x}.",
            "Which size has the {x}?",
        ),
        "unseen": ("How big is the {x}?", "Tell me the extent of the {x}."),
    },
    "level": {
        "seen": (
            "How bright is the {x}?",
            "What is the brightness of the {x}?",
            "Which level of grey has the {x}?",
            "Name the brightness of the {x}.",
        ),
        "unseen": ("How light is the {x}?", "Tell me the density of the {x}."),
    },
    "brightest": {
        "seen": ("Which shape is the brightest?", "What is the brightest shape?", "Name the brightest shape."),
        "unseen": ("Which figure is lightest?",),
    },
    "darkest": {
        "seen": ("Which shape is the darkest?", "What is the darkest shape?", "Name the darkest shape."),
        "unseen": ("Which figure is least bright?",),
    },
    "texture": {
        "seen": (
            "What is the background like?",
            "Which background is shown?",
            "Name the texture of the background.",
            "What texture has the background?",
            "How does the background look?",
        ),
        "unseen": ("What lies behind the shapes?", "Which pattern fills the picture?"),
    },
    "holder": {
        "seen": (
            "Which shape contains a {k}?",
            "Which shape has a {k}?",
            "In which shape is a {k}?",
            "What shape shows a {k}?",
            "Name the shape with a {k}.",
        ),
        "unseen": ("What figure holds a {k}?", "Where does a {k} lie?"),
    },
    "content": {
        "seen": (
            "What is inside the {x}?",
            "What does the {x} contain?",
            "What is seen in the {x}?",
            "Name the content of the {x}.",
            "Which thing is in the {x}?",
        ),
        "unseen": ("What does the {x} hold?", "What can be found within the {x}?"),
    },
    "side": {
        "seen": (
            "Where in the {x} is the {k}?",
            "In which part of the {x} is the {k}?",
            "On which side of the {x} is the {k}?",
            "Where is the {k} in the {x}?",
            "Name the side of the {k} in the {x}.",
        ),
        "unseen": ("At what end of the {x} does the {k} lie?", "Localise the {k} within the {x}."),
    },
}
CAPTION_REQUESTS: dict[str, tuple[str, ...]] = {
    "seen": (
        "Describe the picture.",
        "Please describe this picture.",
        "Write a caption.",
        "Write a report of this picture.",
        "Give a report of the picture.",
        "Report what is shown.",
        "Please write what is seen.",
        "Describe the shapes in the picture.",
    ),
    "unseen": (
        "Summarise the scene in a few sentences.",
        "Put the drawing into words.",
        "Tell a friend everything you observe.",
    ),
}
