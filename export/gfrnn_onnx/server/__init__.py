"""The HTTP server: OpenAI's completions interface over one model of text. Needs the extra `serve`, not torch.

main -> connection (clients that stall), app (routes) -> protocol (what requests may say), limits (who may ask how much)
-> engine (rows stepped together) -> prefixes (states of prompts read before); text (bytes as characters), metrics.
"""
