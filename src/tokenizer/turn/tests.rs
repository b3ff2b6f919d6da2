//! Turns as the families write them, broken at every place.

use super::*;
use crate::tokenizer::{Grammars, TokenizerFiles};
use serde_json::json;

fn tokenizer() -> Tokenizer {
    let files = TokenizerFiles {
        checkpoint: "demo-mixtral",
        tokenizer_json: Some(include_bytes!("../../../models/demo-mixtral/tokenizer.json")),
        tokenizer_config: Some(include_bytes!("../../../models/demo-mixtral/tokenizer_config.json")),
        ..TokenizerFiles::default()
    };
    Tokenizer::from_parts(&files, 4096).unwrap()
}

fn tools() -> Arc<[Callable]> {
    let parameters = json!({"type": "object", "required": ["city"], "additionalProperties": false,
        "properties": {"city": {"type": "string", "maxLength": 5}, "days": {"type": "integer", "minimum": 1, "maximum": 7}}});
    let weather = Callable { name: "weather".into(), parameters };
    let now = Callable {
        name: "now".into(),
        parameters: json!({"type": "object", "properties": {}, "additionalProperties": false}),
    };
    vec![weather, now].into()
}

/// A template in the style of each family: what it mentions tells the style.
const TEMPLATES: &[(&str, &str)] = &[
    ("hermes", "{{ tools }}<tool_call>\n{\"name\": , \"arguments\": }\n</tool_call> </think>"),
    ("qwen3_coder", "{{ tools }}<tool_call>\n<function=f>\n<parameter=p>"),
    ("glm4", "{{ tools }}<tool_call>f\n<arg_key>k</arg_key>\n<arg_value>v</arg_value></think>"),
    ("mistral", "{{ tools }}[TOOL_CALLS]["),
    ("mistral_args", "{{ tools }}[TOOL_CALLS]f[ARGS]{}"),
    (
        "deepseek_v3",
        "{{ tools }}<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n",
    ),
    ("deepseek_v31", "{{ tools }}<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>f<｜tool▁sep｜>{}</think>"),
    (
        "kimi_k2",
        "{{ tools }}<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>",
    ),
    ("granite", "{{ tools }}<|tool_call|>["),
];

fn style(name: &str) -> TurnStyle {
    let source = TEMPLATES.iter().find(|(family, _)| *family == name).unwrap().1;
    TurnStyle::of(&ChatTemplate::compile(source).unwrap()).unwrap()
}

fn harmony() -> TurnStyle {
    TurnStyle::of(&ChatTemplate::compile("<|start|>assistant<|channel|>final<|message|>{{ tools }}").unwrap())
        .unwrap()
}

/// Thoughts, text and calls of a turn.
#[derive(Debug, Default, PartialEq)]
struct Turn {
    reasoning: String,
    content: String,
    calls: Vec<(String, Value)>,
}

fn parse(style: TurnStyle, prompt: &str, pieces: &[&str]) -> Turn {
    let mut parser = style.parser(prompt, Some(tools()));
    let mut deltas = Vec::new();
    pieces.iter().for_each(|piece| parser.push(piece, &mut deltas));
    parser.finish(&mut deltas);
    let mut turn = Turn::default();
    let mut calls: Vec<(String, String)> = Vec::new();
    for delta in deltas {
        match delta {
            Delta::Reasoning(text) => turn.reasoning += &text,
            Delta::Content(text) => turn.content += &text,
            Delta::Call { name } => calls.push((name, String::new())),
            Delta::Arguments(text) => calls.last_mut().expect("a call has begun").1 += &text,
        }
    }
    // What the length limit cut off is no JSON.
    let json = |text: String| serde_json::from_str(&text).unwrap_or(Value::String(text));
    turn.calls = calls.into_iter().map(|(name, arguments)| (name, json(arguments))).collect();
    turn
}

/// The turn, whatever its pieces: whole, cut in two at every place, and character by character.
#[track_caller]
fn check(style: TurnStyle, prompt: &str, text: &str, reasoning: &str, content: &str, calls: Value) {
    let calls =
        calls.as_array().unwrap().iter().map(|call| (call[0].as_str().unwrap().to_owned(), call[1].clone()));
    let expected = Turn { reasoning: reasoning.into(), content: content.into(), calls: calls.collect() };
    assert_eq!(parse(style, prompt, &[text]), expected, "whole: {text}");
    for (at, _) in text.char_indices() {
        assert_eq!(parse(style, prompt, &[&text[..at], &text[at..]]), expected, "cut at {at}: {text}");
    }
    let chars: Vec<String> = text.chars().map(String::from).collect();
    let chars: Vec<&str> = chars.iter().map(String::as_str).collect();
    assert_eq!(parse(style, prompt, &chars), expected, "by character: {text}");
}

#[test]
fn styles_are_told_by_templates() {
    for (name, source) in TEMPLATES {
        let style = TurnStyle::of(&ChatTemplate::compile(source).unwrap()).unwrap();
        let TurnStyle::Marked { calls: Some(calls), .. } = style else { panic!("{name}: {style:?}") };
        assert_eq!(calls.name, *name);
        // Without the variable `tools`, the same marks mean nothing.
        let blind = ChatTemplate::compile(&source.replace("tools }}", "x }}")).unwrap();
        assert!(!TurnStyle::of(&blind).is_some_and(|style| style.calls_tools()), "{name}");
    }
    assert_eq!(TurnStyle::of(&ChatTemplate::compile("{{ messages }}").unwrap()), None);
    assert_eq!(harmony(), TurnStyle::Harmony { calls: true });
}

#[test]
fn calls_of_every_family() {
    let one = json!([["weather", {"city": "Oslo", "days": 2}]]);
    let two = json!([["weather", {"city": "Oslo", "days": 2}], ["now", {}]]);
    for (family, text, calls) in [
        (
            "hermes",
            "<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Oslo\", \"days\": 2}}\n</tool_call>",
            &one,
        ),
        (
            "hermes",
            "<tool_call>{\"name\": \"weather\", \"arguments\": \"{\\\"city\\\": \\\"Oslo\\\", \\\"days\\\": 2}\"}</tool_call>\n<tool_call>{\"name\": \"now\"}</tool_call>",
            &two,
        ),
        (
            "qwen3_coder",
            "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>",
            &one,
        ),
        (
            "glm4",
            "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call><tool_call>now\n</tool_call>",
            &two,
        ),
        (
            "mistral",
            "[TOOL_CALLS][{\"name\": \"weather\", \"arguments\": {\"city\": \"Oslo\", \"days\": 2}}, {\"name\": \"now\", \"arguments\": {}}]",
            &two,
        ),
        (
            "mistral_args",
            "[TOOL_CALLS]weather[ARGS]{\"city\": \"Oslo\", \"days\": 2}[TOOL_CALLS]now[ARGS]{}",
            &two,
        ),
        (
            "deepseek_v3",
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n{\"city\": \"Oslo\", \"days\": 2}\n```<｜tool▁call▁end｜>\n<｜tool▁call▁begin｜>function<｜tool▁sep｜>now\n```json\n{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
            &two,
        ),
        (
            "deepseek_v31",
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>weather<｜tool▁sep｜>{\"city\": \"Oslo\", \"days\": 2}<｜tool▁call▁end｜><｜tool▁calls▁end｜>",
            &one,
        ),
        (
            "kimi_k2",
            "<|tool_calls_section_begin|><|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>{\"city\": \"Oslo\", \"days\": 2}<|tool_call_end|><|tool_calls_section_end|>",
            &one,
        ),
        (
            "granite",
            "<|tool_call|>[{\"name\": \"weather\", \"arguments\": {\"city\": \"Oslo\", \"days\": 2}}]",
            &one,
        ),
    ] {
        check(style(family), "", text, "", "", calls.clone());
        check(style(family), "", &format!("Let me see. \n\n{text}"), "", "Let me see.", calls.clone());
    }
}

/// What is told of a call's arguments while it is written: deltas by the character that led to them.
fn told(style: TurnStyle, text: &str) -> (Option<usize>, Vec<usize>) {
    let mut parser = style.parser("", Some(tools()));
    let (mut begun, mut arguments) = (None, Vec::new());
    for (at, c) in text.char_indices() {
        let mut deltas = Vec::new();
        parser.push(c.encode_utf8(&mut [0; 4]), &mut deltas);
        for delta in deltas {
            match delta {
                Delta::Call { .. } => begun = begun.or(Some(at)),
                Delta::Arguments(_) => arguments.push(at),
                other => panic!("{other:?}"),
            }
        }
    }
    (begun, arguments)
}

/// The name comes first, as soon as its arguments begin; then they come as they are written, in tags one by one.
#[test]
fn arguments_are_told_while_they_are_written() {
    let json = "{\"city\": \"Oslo\", \"days\": 2}";
    for (family, before, after) in [
        ("hermes", "<tool_call>\n{\"name\": \"weather\", \"arguments\": ", "}\n</tool_call>"),
        ("mistral", "[TOOL_CALLS][{\"name\": \"weather\", \"arguments\": ", "}]"),
        ("granite", "<|tool_call|>[{\"name\": \"weather\", \"parameters\": ", "}]"),
        ("mistral_args", "[TOOL_CALLS]weather[ARGS]", ""),
        (
            "deepseek_v3",
            "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>weather\n```json\n",
            "\n```<｜tool▁call▁end｜>",
        ),
        ("deepseek_v31", "<｜tool▁call▁begin｜>weather<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
        (
            "kimi_k2",
            "<|tool_call_begin|>functions.weather:0<|tool_call_argument_begin|>",
            "<|tool_call_end|>",
        ),
    ] {
        let (begun, arguments) = told(style(family), &format!("{before}{json}{after}"));
        assert_eq!(begun, Some(before.len()), "{family}");
        let expected: Vec<usize> = (before.len()..before.len() + json.len()).collect();
        assert_eq!(arguments, expected, "{family}");
    }
    let text = "<|channel|>commentary to=functions.weather<|message|>{\"city\": \"Oslo\"}<|call|>";
    let (begun, arguments) = told(harmony(), text);
    let message = text.find("{").unwrap();
    assert_eq!((begun, arguments[0]), (Some(message - 1), message));
    assert!(arguments.len() >= 13, "{arguments:?}");
    for (family, text) in [
        (
            "qwen3_coder",
            "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n<parameter=days>\n2\n</parameter>\n</function>\n</tool_call>",
        ),
        (
            "glm4",
            "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n<arg_key>days</arg_key>\n<arg_value>2</arg_value>\n</tool_call>",
        ),
    ] {
        let (begun, arguments) = told(style(family), text);
        assert!(
            begun.unwrap() < arguments[0] && arguments[0] < text.find("days").unwrap(),
            "{family}: {arguments:?}"
        );
        assert_eq!((arguments.len(), arguments[2]), (3, text.len() - 1), "{family}");
    }
}

#[test]
fn marks_inside_arguments_are_arguments() {
    let style_and_text = [
        (
            "hermes",
            "<tool_call>{\"name\": \"weather\", \"arguments\": {\"city\": \"</tool_call>}]\\\"\"}, \"id\": \"}1\"}</tool_call>",
        ),
        (
            "mistral",
            "[TOOL_CALLS][{\"name\": \"weather\", \"arguments\": {\"city\": \"</tool_call>}]\\\"\"}, \"id\": \"[TOOL_CALLS]\"}]",
        ),
    ];
    for (family, text) in style_and_text {
        check(style(family), "", text, "", "", json!([["weather", {"city": "</tool_call>}]\""}]]));
    }
}

/// The length limit cuts a call off: what was told stays told, and what was not told is text.
#[test]
fn calls_that_do_not_end() {
    let cut = |text: &str| Value::from(text);
    for (family, text, content, calls) in [
        (
            "hermes",
            "<tool_call>{\"name\": \"weather\", \"arguments\": {\"city\": \"Os",
            "",
            json!([["weather", cut("{\"city\": \"Os")]]),
        ),
        (
            "hermes",
            "<tool_call>{\"name\": \"weather\", \"arguments\": {\"city\": 1</tool_call>so",
            "so",
            json!([["weather", cut("{\"city\": 1")]]),
        ),
        (
            "hermes",
            "<tool_call>{\"name\": \"weather\", \"argu",
            "<tool_call>{\"name\": \"weather\", \"argu",
            json!([]),
        ),
        (
            "mistral",
            "[TOOL_CALLS][{\"name\": \"now\", \"arguments\": {}}, {\"name\"",
            "",
            json!([["now", {}]]),
        ),
        ("mistral_args", "[TOOL_CALLS]now[ARGS]{} and more", "and more", json!([["now", {}]])),
        (
            "qwen3_coder",
            "<tool_call>\n<function=weather>\n<parameter=city>\nOslo\n</parameter>\n<parameter=da",
            "",
            json!([["weather", {"city": "Oslo"}]]),
        ),
        ("glm4", "<tool_call>weather\n<arg_key>ci", "", json!([["weather", {}]])),
        // A tool that was not offered is told when it is whole.
        (
            "mistral",
            "[TOOL_CALLS][{\"name\": \"now\", \"arguments\": {}}, {\"name\": \"other\", \"arguments\": {\"a\": 1}}]",
            "",
            json!([["now", {}], ["other", {"a": 1}]]),
        ),
        (
            "hermes",
            "<tool_call>{\"name\": \"other\", \"arguments\": {\"a\": 1}}</tool_call>",
            "",
            json!([["other", {"a": 1}]]),
        ),
        (
            "hermes",
            "<tool_call>{\"name\": \"other\", \"arguments\": {\"a\": 1",
            "<tool_call>{\"name\": \"other\", \"arguments\": {\"a\": 1",
            json!([]),
        ),
        (
            "hermes",
            "<tool_call>{\"arguments\": {\"city\": \"Oslo\"}, \"name\": \"weather\"}</tool_call>",
            "",
            json!([["weather", {"city": "Oslo"}]]),
        ),
        ("mistral_args", "[TOOL_CALLS][{\"name\": \"now\", \"arguments\": {}}]", "", json!([["now", {}]])),
    ] {
        check(style(family), "", text, "", content, calls);
    }
}

#[test]
fn thoughts_come_before_the_answer() {
    let style = style("hermes");
    check(style, "<|assistant|>", "<think>\nhm\nhm\n</think>\n\nYes < no", "hm\nhm", "Yes < no", json!([]));
    check(style, "<|assistant|><think>\n", "hm</think>Yes", "hm", "Yes", json!([]));
    check(style, "<|assistant|><think>\n", "hm", "hm", "", json!([]));
    check(style, "<|assistant|>", " no <think> here", "", " no <think> here", json!([]));
    check(style, "<|assistant|>", "", "", "", json!([]));
    let call = "<think>hm</think>\n<tool_call>\n{\"name\": \"now\", \"arguments\": {}}\n</tool_call>";
    check(style, "", call, "hm", "", json!([["now", {}]]));
}

#[test]
fn what_is_no_call_is_text() {
    let style = style("hermes");
    for text in [
        "a < b <tool",
        "<tool_call>\nnonsense\n</tool_call>",
        "<tool_call>{\"name\": 3}</tool_call> and more",
        "<tool_call>{\"name\": \"now\"",
    ] {
        check(style, "", text, "", text, json!([]));
    }
    // Nobody asked for calls.
    let text = "<tool_call>{\"name\": \"now\"}</tool_call>";
    let mut parser = style.parser("", None);
    let mut deltas = Vec::new();
    parser.push(text, &mut deltas);
    parser.finish(&mut deltas);
    assert_eq!(deltas, [Delta::Content(text.into())]);
}

#[test]
fn harmony_channels() {
    let thoughts = "<|channel|>analysis<|message|>hm<|end|><|start|>assistant";
    let (style, prompt) = (harmony(), "<|start|>assistant");
    check(
        style,
        prompt,
        &format!("{thoughts}<|channel|>final<|message|>Yes <|x|>"),
        "hm",
        "Yes <|x|>",
        json!([]),
    );
    let call =
        "<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{\"city\": \"Oslo\"}<|call|>";
    check(style, prompt, &format!("{thoughts}{call}"), "hm", "", json!([["weather", {"city": "Oslo"}]]));
    check(
        style,
        prompt,
        " to=functions.now<|channel|>commentary<|message|><|call|>",
        "",
        "",
        json!([["now", {}]]),
    );
    check(style, prompt, "<|channel|>commentary<|message|>First,", "", "First,", json!([]));
    check(style, prompt, "no format at all", "", "no format at all", json!([]));
}

/// A grammar for an answer beside calls admits both, and nothing else.
#[test]
fn an_answer_or_calls() {
    let tokenizer = tokenizer();
    let grammars = Grammars::new(&tokenizer, &[1]).unwrap();
    let answer =
        GrammarSource::JsonSchema(json!({"type": "object", "properties": {"city": {"enum": ["Oslo"]}},
        "required": ["city"], "additionalProperties": false}));
    let admits = |source: &GrammarSource, text: &str| {
        let state = grammars.compile(source).unwrap().follow(GrammarStart::default(), 100_000);
        let tokens = tokenizer.encode(text, false).unwrap();
        (0..tokens.len()).all(|at| {
            let mut bits = vec![u32::MAX; 4096 / 32];
            state.restrict(&tokens[..at], &mut bits).is_ok()
                && bits[tokens[at] as usize / 32] >> (tokens[at] % 32) & 1 == 1
        })
    };
    let (source, start) = style("hermes").answer_or_calls(&answer, &tokenizer, &tools(), false, "").unwrap();
    assert_eq!(start, GrammarStart::default());
    for (text, admitted) in [
        ("{\"city\": \"Oslo\"}", true),
        ("<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"Rome\"}}\n</tool_call>", true),
        ("{\"city\": \"Rome\"}", false),
        ("Sure", false),
        ("<tool_call>\n{\"name\": \"other\"", false),
    ] {
        assert_eq!(admits(&source, text), admitted, "{text}");
    }
    let lark = GrammarSource::Lark("start: \"a\"".into());
    assert!(style("hermes").answer_or_calls(&lark, &tokenizer, &tools(), false, "").is_err());
    assert_eq!(harmony().answer_or_calls(&lark, &tokenizer, &tools(), false, "").unwrap().0, lark);
}

/// What a grammar for required calls admits, its own parser understands: for every family.
#[test]
fn required_calls_are_understood() {
    const EOS: u32 = 1;
    let tokenizer = tokenizer();
    let grammars = Grammars::new(&tokenizer, &[EOS]).unwrap();
    let styles = TEMPLATES.iter().map(|(name, _)| (*name, style(name))).chain([("harmony", harmony())]);
    for (name, style) in styles {
        for parallel in [false, true] {
            let (source, start) = style.required_calls(&tokenizer, &tools(), parallel, "").unwrap();
            let grammar = grammars.compile(&source).unwrap_or_else(|why| panic!("{name}: {why}\n{source:?}"));
            for step in [1usize, 5, 13] {
                let state = grammar.follow(start.clone(), 100_000);
                let (mut tokens, mut calls) = (Vec::new(), 0);
                loop {
                    let mut bits = vec![u32::MAX; 4096 / 32];
                    state.restrict(&tokens, &mut bits).unwrap();
                    let allowed: Vec<u32> =
                        (0..4096).filter(|id| bits[*id as usize / 32] >> (id % 32) & 1 == 1).collect();
                    calls += step;
                    if allowed.contains(&EOS) && (tokens.len() > 60 || allowed.len() == 1) {
                        break;
                    }
                    let others: Vec<u32> = allowed.into_iter().filter(|&id| id != EOS).collect();
                    tokens.push(others[calls * 17 % others.len()]);
                    assert!(tokens.len() < 4000, "{name}: no end");
                }
                let bytes: Vec<u8> =
                    tokens.iter().flat_map(|&token| tokenizer.token_bytes(token)).copied().collect();
                let text = String::from_utf8(bytes).unwrap();
                let turn = parse(style, "", &[&text]);
                assert!(!turn.calls.is_empty() && turn.content.is_empty(), "{name}: {text:?} is {turn:?}");
                assert!(parallel || turn.calls.len() == 1, "{name}: {text:?}");
                for (called, arguments) in &turn.calls {
                    match called.as_str() {
                        "weather" => assert!(arguments["city"].is_string(), "{name}: {text:?}"),
                        other => assert_eq!(other, "now", "{name}: {text:?}"),
                    }
                }
            }
        }
    }
}
