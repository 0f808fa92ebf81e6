"""First words of prompts, written for this project: the target goes on from them, so that its prompts vary.

None is taken from a benchmark.
"""

from __future__ import annotations

OPENINGS = (
    # writing
    "Write a short story about", "Write a poem about", "Write a letter to", "Write an email to my",
    "Write a dialogue between", "Write a product description for", "Write a speech for", "Write a diary entry by",
    "Write a news report on", "Write a song about", "Write a review of", "Write a blog post about",
    "Write an essay on", "Draft an invitation to", "Draft a complaint about", "Draft a thank-you note for",
    "Continue this story:", "Describe a scene in which", "Describe the taste of", "Invent a fairy tale about",
    "Come up with a slogan for", "Think of five names for", "Make this sentence sound friendlier:",
    # knowledge
    "Explain how", "Explain why", "Explain the difference between", "Explain to a child what", "What is the purpose of",
    "What happens when", "What causes", "What are the main parts of", "What were the consequences of", "Who invented",
    "When was the first", "Where can you find", "Why do people", "Why does the", "How does a", "How did the",
    "Tell me about the history of", "Tell me three facts about", "Give an overview of", "Define the term",
    "Is it true that", "Which animals", "Which countries", "What do we know about",
    # advice
    "How do I", "How can I improve my", "How should I prepare for", "What should I do if", "What is the best way to",
    "Can you help me with", "Give me advice on", "Give me tips for", "Suggest a gift for", "Suggest a recipe with",
    "Recommend books about", "Plan a weekend in", "Plan a weekly menu for", "Make a checklist for",
    "Make a timetable for", "I am having trouble with", "I would like to learn", "My friend told me that", "I need to",
    # code
    "Write a Python function that", "Write a JavaScript function that", "Write a SQL query that",
    "Write a shell script that", "Write an HTML page with", "Write a class in Java that", "Write a C program that",
    "Write a regular expression that", "Write unit tests for", "Fix the bug in this code:", "What does this code do:",
    "Explain this error message:", "How do I sort", "How do I read a file in", "Optimise this function:",
    "Design a database for", "Design an API for", "Which data structure",
    # mathematics and reasoning
    "Solve:", "Solve the equation", "Calculate the", "A train leaves", "A shop sells", "If I have",
    "There are", "How many", "What is the sum of", "What is the area of", "Convert", "Find the next number:",
    "Prove that", "What is the probability that", "Anna is older than", "Three friends", "Put these in order:",
    "Which of these does not belong:", "What follows from", "Find the mistake in this argument:",
    # transformation of text
    "Summarise the following text:", "Summarise the plot of", "Translate into French:", "Translate into English:",
    "Rewrite this paragraph:", "Correct the grammar:", "Extract the names from this text:",
    "Extract all dates from the following:", "Turn this list into a table:", "Classify these reviews:",
    "Is the mood of this text positive or negative?", "Give this article a headline:", "Answer with JSON:",
    "List the keywords of", "Shorten this text:", "Compare", "Compare the following two", "Sort these items by",
    # play
    "Role-play as", "Pretend to be", "You are a guide in", "You are an old sailor.", "You are a robot that",
    "Imagine that", "Imagine a world without", "What would happen if", "Let us play a game:", "Ask me questions about",
    "Argue for and against", "Tell me a joke about", "Make up a riddle about", "Interview a",
    # science and the humanities
    "Describe how plants", "Describe the life of", "Describe an experiment that", "Explain the theory of",
    "Explain the role of", "What is known about the planet", "How do scientists measure", "What does the philosopher",
    "What is the meaning of the painting", "How did the economy of", "Outline the plot of a novel about",
    "List the advantages of", "List the steps to", "List reasons why", "Name some examples of", "Discuss whether",
)  # fmt: skip
"""Beginnings in the user's words; half of the prompts that the target writes start with one."""
