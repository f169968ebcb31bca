# SPDX-License-Identifier: Apache-2.0
"""The demo's text in Thai and English: documents, chats and preferences, made from templates by a seed."""
