"""Providers that answer some agents in the policy's place: which, how they are asked, and what is recorded of what they say."""
