"""Chats and judge prompts in the forms of the paper's code."""

from train.claims.claim import JudgePrompt, Question
from train.claims.messages import build_messages, judge_messages, option_order, visible

OPTIONS = (("claim", "Cheese."), ("local_negation", "Not cheese."), ("idk", "I do not know."))


def test_a_chat_is_system_prompt_then_earlier_turns_then_the_question():
    prefix = (("user", "Who won?"), ("assistant", "Ed."))
    question = Question("a", "robustness", "Sure?", system_prompt="Doubt.", messages_prefix=prefix)
    assert build_messages(question) == [
        {"role": "system", "content": "Doubt."},
        {"role": "user", "content": "Who won?"},
        {"role": "assistant", "content": "Ed."},
        {"role": "user", "content": "Sure?"},
    ]
    assert build_messages(Question("b", "open", "Why {x}? ")) == [{"role": "user", "content": "Why {x}? "}]


def test_a_yes_no_question_has_the_papers_system_prompt():
    system, user = build_messages(Question("a", "yes_no", "Is it?", expected="yes"))
    assert system["content"] == (
        'Answer the following question with either "yes" or "no". Respond with JSON in this exact format: '
        '{"answer": "yes"} or {"answer": "no"}. Do not include any other text.'
    )
    assert user == {"role": "user", "content": "Is it?"}


def test_documents_in_context_stand_in_the_questions_own_message():
    question = Question("a", "robustness", "Sure?", messages_prefix=(("user", "Who?"), ("assistant", "Ed.")))
    messages = build_messages(question, ["One {.", "Two"])
    assert messages[:2] == [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Ed."}]
    assert messages[2]["content"] == (
        "Here are some documents:\n\n[DOCUMENT 1]\n\nOne {.\n\n[DOCUMENT 2]\n\nTwo\n\n[QUESTION]\n\nSure?"
    )


def test_options_are_shown_in_an_order_drawn_by_sample_and_shared_by_a_pair():
    correct = Question("s__q1_correct", "salience", "Which is true?", "q1_correct", options=OPTIONS)
    wrong = Question("s__q2_wrong", "salience", "Which is false?", "q2_wrong", options=OPTIONS)
    orders = [option_order(correct, sample) for sample in range(20)]
    assert orders == [option_order(wrong, sample) for sample in range(20)]
    assert len({tuple(order) for order in orders}) == 6  # all that there are
    order = option_order(correct, 3)
    texts = dict(OPTIONS)
    system, user = build_messages(correct, sample=3)
    assert system["content"].startswith(
        "Answer the following multiple choice question with a single letter: A, B, or C."
    )
    shown = "\n".join(f"{letter}) {texts[role]}" for letter, role in zip("ABC", order, strict=True))
    assert user["content"] == f"Which is true?\n\n{shown}"


def test_a_judge_prompt_is_a_template_and_what_is_put_in_is_none():
    judge = JudgePrompt('Q {question} A {answer} JSON {{"answer": "yes"}}', "answer")
    (message,) = judge_messages(judge, "Complete {json}", '{"a": {question}} {{')
    assert message["content"] == 'Q Complete {json} A {"a": {question}} {{ JSON {"answer": "yes"}'


def test_the_judge_does_not_see_what_a_model_thinks_to_itself():
    assert visible("<think>He won?</think>\n No. ") == "No."
    assert visible("He won?</think>No.") == "No."  # where the template opens the thinking
    assert visible("Yes.<think>a</think> Well.<think>b") == "Yes. Well."
    assert visible("<think>and on and on") == visible("") == visible(" \n") == "[failed to generate response]"
