//! Logits and scores of prompt tokens, whatever the chunks.

use super::world::{VOCAB, World, options, prompt, request};
use crate::engine::options::EngineOptions;
use crate::engine::request::{Capture, Request};
use crate::engine::scripted::Script;

#[test]
fn prompt_logits_come_in_order_whatever_the_limits() {
    for max_logit_rows in [2, 5, 64] {
        let options = EngineOptions { max_num_seqs: 2, max_logit_rows, ..options() };
        let mut world = World::new(&options, 1);
        let tokens = prompt(0, 37);
        // A cached prefix would hide positions: it must not be read.
        world.add(0, request(tokens.clone(), 1));
        world.run();
        world.add(1, request(prompt(1, 4), 40));
        let capture = Capture { prompt_logits: true, ..Capture::default() };
        world.add(2, Request { capture, ..request(tokens.clone(), 3) });
        world.add(3, Request { capture: Capture { last_logits: true, ..capture }, ..request(vec![5], 0) });
        let last = Capture { last_logits: true, ..Capture::default() };
        world.add(4, Request { capture: last, ..request(tokens.clone(), 0) });
        world.run();

        let rows: Vec<Vec<f32>> = (1..=tokens.len()).map(|n| row_of(&world.script, &tokens[..n])).collect();
        let captured = |id| &world.finished(id).captured.as_ref().expect("logits").logits;
        assert_eq!(captured(2), &rows.concat());
        assert_eq!(captured(3), &row_of(&world.script, &[5]));
        assert_eq!(captured(4), rows.last().unwrap());
        assert_eq!((world.finished(2).cached_tokens, world.finished(4).cached_tokens), (0, 36));
        assert_eq!(world.outputs[&2].tokens, world.script.greedy(&tokens, 3));
    }
}

/// The logits after some prompt tokens.
fn row_of(script: &Script, tokens: &[u32]) -> Vec<f32> {
    let mut logits = vec![0.0; VOCAB];
    script.fill_logits(script.history(tokens, tokens.len()), tokens[tokens.len() - 1], &mut logits);
    logits
}

/// The scores of a prompt are those of its tokens in the rows before them, whatever the chunks; the prefix cache, which
/// has no logits, is not read.
#[test]
fn prompt_scores_are_complete() {
    for (max_logit_rows, len) in [(2, 37), (5, 37), (64, 37), (2, 1)] {
        let options = EngineOptions { max_num_seqs: 2, max_logit_rows, ..options() };
        let mut world = World::new(&options, 1);
        let tokens = prompt(0, len);
        world.add(0, request(tokens.clone(), 1));
        world.run();
        world.add(1, request(prompt(1, 4), 40));
        world.add(2, Request { prompt_logprobs: Some(3), logprobs: Some(1), ..request(tokens.clone(), 2) });
        world.add(3, Request { prompt_logprobs: Some(0), ..request(tokens.clone(), 0) });
        world.run();
        assert_eq!(world.finished(2).cached_tokens, 0);
        for (id, top) in [(2, 3), (3, 0)] {
            let scores = &world.outputs[&id].scores;
            assert_eq!(scores.iter().map(|score| score.token).collect::<Vec<_>>(), tokens[1..]);
            for (i, score) in scores.iter().enumerate() {
                let row = row_of(&world.script, &tokens[..=i]);
                let sum: f64 = row.iter().map(|&x| f64::from(x).exp()).sum();
                let expected = f64::from(row[score.token as usize]) - sum.ln();
                assert!((f64::from(score.logprob.unwrap()) - expected).abs() < 1e-5);
                assert_eq!(score.top.len(), top);
            }
        }
    }
}
