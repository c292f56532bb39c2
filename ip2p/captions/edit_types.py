"""What kinds of edit people ask for: the taxonomy of our triplets, and of the answers that name their type."""

# What one edit changes; a triplet has the type that the instruction asks for, not what else follows from it.
EDIT_TYPES = {
    "replace": "one thing becomes another in its place",
    "add": "something new appears",
    "remove": "something disappears, the rest stays",
    "colour": "a thing changes its colour",
    "material": "a thing is made of something else",
    "style": "the whole image is in another medium or art style",
    "background": "what is behind the subject changes",
    "weather": "rain, fog, snowfall, wind, sunshine, ice",
    "time": "the time of day",
    "season": "the time of year",
    "count": "there are more or fewer of a thing",
    "pose": "posture, action or facial expression",
    "text": "written words or numbers",
    "move": "a thing is in another place in the image",
    "swap": "two things exchange places or looks",
    "isolate": "only the subject is left, on a plain background",
    "size": "a thing becomes larger or smaller",
}
