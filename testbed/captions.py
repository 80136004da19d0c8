"""What the models learn to draw, and the sixteen captions by which they are judged."""

DEMO = (
    "red heart", "grinning face", "yellow heart", "watermelon", "soccer ball", "crescent moon", "red apple", "blue heart",
    "cat face", "green apple", "sun", "pizza", "stop sign", "rainbow", "banana", "frog",
)
GROUPS = ("Food & Drink", "Animals & Nature")
LONGEST = 2  # words, for captions taken by group
OTHERS = (
    "green heart", "purple heart", "orange heart", "black heart", "white heart", "broken heart",
    "neutral face", "smiling face with sunglasses", "smiling face with heart-eyes", "crying face", "angry face", "sleeping face",
    "nerd face", "face with open mouth", "skull", "ghost", "alien", "robot",
    "balloon", "wrapped gift", "trophy", "basketball", "tennis", "baseball", "bullseye", "game die", "teddy bear", "crystal ball",
    "star", "full moon", "cloud", "fire", "droplet", "snowflake", "high voltage", "snowman", "rocket", "airplane", "automobile",
    "bus", "house", "sailboat", "umbrella", "volcano", "alarm clock",
)
