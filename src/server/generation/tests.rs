//! What the shared fields become, and how each is refused.

use super::*;

fn take(json: &str) -> Result<Generation, ApiError> {
    let mut fields = Fields::parse(json.as_bytes())?;
    let generation = Generation::take(&mut fields, &SamplingDefaults::default())?;
    fields.finish(&[])?;
    Ok(generation)
}

#[test]
fn defaults_come_from_the_request_then_the_checkpoint_then_openai() {
    let checkpoint = SamplingDefaults { temperature: 0.8, top_p: 0.95, top_k: 40, ..Default::default() };
    let mut fields = Fields::parse(br#"{"top_p": 0.5}"#).unwrap();
    let sampling = Generation::take(&mut fields, &checkpoint).unwrap().sampling;
    assert_eq!((sampling.temperature, sampling.top_p, sampling.top_k), (0.8, 0.5, 40));
    let none = take("{}").unwrap();
    assert_eq!(none.sampling, Sampling { temperature: 1.0, ..Sampling::GREEDY });
    assert!(none.skip_special_tokens && none.stream.is_none() && none.n == 1);
}

#[test]
fn a_seed_makes_streams_for_all_choices_and_none_makes_new_ones() {
    let seeded = take(r#"{"seed": -1, "n": 3}"#).unwrap();
    let seeds: Vec<u64> = (0..3).map(|k| seeded.sampling_of(k, &[]).seed).collect();
    assert_eq!(seeds, [u64::MAX, 0, 1]);
    let drawn = take("{}").unwrap();
    assert_ne!(drawn.sampling_of(0, &[]).seed, drawn.sampling_of(0, &[]).seed);
}

#[test]
fn every_field_arrives() {
    let given = take(
        r#"{"temperature": 0.5, "top_p": 0.9, "top_k": 7, "min_p": 0.1, "repetition_penalty": 1.5,
        "presence_penalty": -2, "frequency_penalty": 2, "logit_bias": {"9": -100, "3": 100}, "min_tokens": 4,
        "allowed_token_ids": [5, 3, 5], "bad_words": ["x"], "n": 2, "stop": "a", "stop_token_ids": [1],
        "include_stop_str_in_output": true, "ignore_eos": true, "skip_special_tokens": false,
        "spaces_between_special_tokens": false, "return_token_ids": true, "return_tokens_as_token_ids": true,
        "truncate_prompt_tokens": -1, "routed_experts": true, "request_id": "r-1", "priority": -3, "cache_salt": "s", "user": "u", "stream": true,
        "stream_interval": 5, "stream_options": {"include_usage": true, "continuous_usage_stats": true}}"#,
    )
    .unwrap();
    let expected = Generation {
        n: 2,
        sampling: Sampling {
            temperature: 0.5,
            top_p: 0.9,
            top_k: 7,
            min_p: 0.1,
            repetition_penalty: 1.5,
            presence_penalty: -2.0,
            frequency_penalty: 2.0,
            logit_bias: vec![(3, 100.0), (9, -100.0)],
            allowed_tokens: Some([3, 5].into()),
            bad_words: vec![],
            min_tokens: 4,
            seed: 0,
        },
        seed: None,
        bad_words: vec!["x".into()],
        stop: vec!["a".into()],
        include_stop: true,
        stop_token_ids: vec![1],
        ignore_eos: true,
        prompt_logprobs: None,
        skip_special_tokens: false,
        spaces_between_special_tokens: false,
        return_token_ids: true,
        tokens_as_ids: true,
        truncate: Some(Truncation::ToContext),
        routed_experts: true,
        priority: -3,
        cache_salt: Some("s".into()),
        request_id: Some("r-1".into()),
        stream: Some(StreamOptions { include_usage: true, continuous_usage: true, interval: 5 }),
    };
    assert_eq!(given, expected);
    assert_eq!(take(r#"{"prompt_logprobs": 3}"#).unwrap().prompt_logprobs, Some(3));
    assert!(take(r#"{"top_p": 1e-60}"#).unwrap().sampling.top_p > 0.0);
}

#[test]
fn a_refusal_names_its_field() {
    for (fields, param) in [
        (r#""user": 3"#, "user"),
        (r#""temperature": -0.1"#, "temperature"),
        (r#""temperature": 2.01"#, "temperature"),
        (r#""top_p": 0"#, "top_p"),
        (r#""top_p": 1.1"#, "top_p"),
        (r#""top_k": -2"#, "top_k"),
        (r#""top_k": 1.5"#, "top_k"),
        (r#""min_p": -0.1"#, "min_p"),
        (r#""min_p": 1.1"#, "min_p"),
        (r#""repetition_penalty": 0"#, "repetition_penalty"),
        (r#""repetition_penalty": 1e39"#, "repetition_penalty"),
        (r#""presence_penalty": 2.1"#, "presence_penalty"),
        (r#""frequency_penalty": -2.1"#, "frequency_penalty"),
        (r#""seed": 1.5"#, "seed"),
        (r#""seed": 9223372036854775808"#, "seed"),
        (r#""n": 0"#, "n"),
        (r#""n": 129"#, "n"),
        (r#""n": 2, "temperature": 0"#, "n"),
        (r#""stop": """#, "stop"),
        (r#""stop": ["a", ""]"#, "stop"),
        (r#""stop": ["a", "b", "c", "d", "e"]"#, "stop"),
        (r#""stop": [1]"#, "stop"),
        (r#""stop_token_ids": [-1]"#, "stop_token_ids"),
        (r#""min_tokens": -1"#, "min_tokens"),
        (r#""logit_bias": {"x": 1}"#, "logit_bias"),
        (r#""logit_bias": {"1.5": 1}"#, "logit_bias"),
        (r#""logit_bias": {"-1": 1}"#, "logit_bias"),
        (r#""logit_bias": {"1": 101}"#, "logit_bias"),
        (r#""logit_bias": {"1": "a"}"#, "logit_bias"),
        (r#""logit_bias": {"1": 1, "01": 2}"#, "logit_bias"),
        (r#""logit_bias": []"#, "logit_bias"),
        (r#""allowed_token_ids": []"#, "allowed_token_ids"),
        (r#""allowed_token_ids": [-1]"#, "allowed_token_ids"),
        (r#""bad_words": [""]"#, "bad_words"),
        (r#""bad_words": "x""#, "bad_words"),
        (r#""prompt_logprobs": 21"#, "prompt_logprobs"),
        (r#""prompt_logprobs": -1"#, "prompt_logprobs"),
        (r#""prompt_logprobs": 1, "stream": true"#, "prompt_logprobs"),
        (r#""truncate_prompt_tokens": 0"#, "truncate_prompt_tokens"),
        (r#""truncate_prompt_tokens": -2"#, "truncate_prompt_tokens"),
        (r#""priority": 2147483648"#, "priority"),
        (r#""priority": 0.5"#, "priority"),
        (r#""cache_salt": """#, "cache_salt"),
        (r#""request_id": """#, "request_id"),
        (r#""request_id": "a b""#, "request_id"),
        (r#""stream": 1"#, "stream"),
        (r#""stream_options": {"include_usage": true}"#, "stream_options"),
        (r#""stream_interval": 2"#, "stream_interval"),
        (r#""stream": true, "stream_interval": 0"#, "stream_interval"),
        (r#""stream": true, "stream_options": {"include_usage": 1}"#, "stream_options.include_usage"),
        (r#""stream": true, "stream_options": {"what": 1}"#, "stream_options.what"),
        (r#""stream": true, "stream_options": []"#, "stream_options"),
        (r#""use_beam_search": true"#, "use_beam_search"),
        (r#""guided_json": {}"#, "guided_json"),
        (r#""surprise": 1"#, "surprise"),
    ] {
        let error = take(&format!("{{{fields}}}")).expect_err(fields);
        assert_eq!(error.param.as_deref(), Some(param), "{fields}: {}", error.message);
        assert!(error.message.contains(param), "{fields}: {}", error.message);
    }
    let long = format!(r#"{{"stop": "{}"}}"#, "y".repeat(2000));
    assert!(take(&long).unwrap_err().message.contains("got 2000"));
    let many = format!(r#"{{"stop_token_ids": [{}0]}}"#, "0,".repeat(200));
    assert!(take(&many).unwrap_err().message.contains("got 201"));
    let many: String = (0..5000).map(|i| format!("\"{i}\": 1,")).collect();
    let many = take(&format!(r#"{{"logit_bias": {{{many}"x": 1}}}}"#)).unwrap_err();
    assert!(many.message.contains("more than 4096"), "{}", many.message);
}
