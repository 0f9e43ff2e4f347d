"""An OpenAI-compatible server: one engine thread that writes all answers at once, HTTP around it."""
