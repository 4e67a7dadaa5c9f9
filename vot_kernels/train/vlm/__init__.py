"""What the stages of the video-language model share: conversations, the model and its parts, the loop."""
