//! Whole runs of decisions on scripted load.

use super::*;
use crate::load::{LoadWindow, Phase};
use crate::placement::{ClusterShape, Placement, PlacementPolicy, PolicyName};
use crate::split::Split;

const EXPERTS: usize = 8;
/// Twelve slots; the linear placement has one copy of experts 4 to 7.
const CLUSTER: ClusterShape = ClusterShape { ranks: 4, redundant: 4 };

/// A run whose migrations arrive at once.
struct Run {
    rebalancer: Rebalancer,
    counts: LoadWindow,
    placement: Placement,
    inputs: Inputs,
    step: u64,
    verdicts: Vec<Verdict>,
}

impl Run {
    fn new(settings: Rebalancing, cluster: ClusterShape) -> Run {
        let counts = LoadWindow::new(&[0, 1], EXPERTS);
        let policy = PolicyName::BEST;
        Run {
            rebalancer: Rebalancer::new(settings, policy, cluster, Split::Exact, counts.clone()),
            placement: crate::placement::Linear.place(&counts, &cluster).unwrap(),
            counts,
            inputs: Inputs {
                row_us: [1.0, 1.0],
                expert_bytes: 1e6,
                migration_bytes_per_us: 1e4,
                switch_us: 10.0,
            },
            step: 0,
            verdicts: Vec::new(),
        }
    }

    fn auto(window: u64) -> Run {
        Run::new(Rebalancing::of_mode(Mode::Auto, window, PolicyName::BEST).unwrap(), CLUSTER)
    }

    /// One step of the same load in both layers; whether experts moved after it.
    fn step(&mut self, phase: Phase, tokens: [u32; EXPERTS]) -> bool {
        (0..2).for_each(|layer| self.counts.add(phase, layer, &tokens));
        self.step += 1;
        match self.rebalancer.after_step() {
            Due::Nothing => false,
            Due::Part => {
                self.rebalancer.end_part(self.step, &self.counts);
                false
            }
            Due::Look => self.look(),
        }
    }

    fn look(&mut self) -> bool {
        let look = self.rebalancer.look(self.step, &self.counts, self.inputs, &self.placement);
        let verdict = look.decide().unwrap();
        assert_eq!(verdict, look.clone().decide().unwrap(), "the same look, the same verdict");
        self.rebalancer.decided(&verdict);
        let moved = match &verdict.target {
            None => false,
            Some(target) => {
                self.placement = target.clone();
                self.rebalancer.moved(self.step);
                true
            }
        };
        self.verdicts.push(verdict);
        moved
    }

    fn last(&self) -> &Verdict {
        self.verdicts.last().expect("a look")
    }

    fn moves(&self) -> usize {
        self.verdicts.iter().filter(|verdict| verdict.target.is_some()).count()
    }
}

/// Some experts are hot.
fn hot(experts: &[usize]) -> [u32; EXPERTS] {
    std::array::from_fn(|expert| if experts.contains(&expert) { 160 } else { 20 })
}

#[test]
fn lasting_heat_is_moved_once_and_keeps_its_promise() {
    let mut run = Run::auto(40);
    for _ in 0..400 {
        run.step(Phase::Decode, hot(&[4, 5]));
    }
    assert_eq!(run.moves(), 1, "{:?}", run.verdicts.iter().map(|v| &v.reason).collect::<Vec<_>>());
    let first = &run.verdicts[0];
    assert_eq!((first.step, first.trigger.as_str(), first.window_steps), (10, "auto", 10));
    assert!(first.reason.starts_with("moving 2 layers of 2 pays: "), "{}", first.reason);
    let Forecast { balance_before, balance_after, balance_bound, moves, bytes, .. } = first.forecast;
    assert!(balance_before < 0.5 && balance_after > 0.95 && balance_bound >= balance_after, "{first:?}");
    assert!(moves >= 2 && bytes == moves as f64 * 1e6);
    let last = run.last();
    assert!(last.forecast.achieved.unwrap() > 0.95 && last.forecast.kept.unwrap() > 0.95, "{last:?}");
    assert_eq!(last.reason, "no plan serves the newest steps better");
    let resting = &run.verdicts[1];
    assert!(
        resting.reason.contains("kept 102 % of what it promised so far: resting until step 50"),
        "{resting:?}"
    );
}

/// Heats, at every step, the two experts that then live on the first rank. Returns the steps of moves.
fn haunted(mode: Mode, steps: usize) -> Vec<u64> {
    let settings = Rebalancing::of_mode(mode, 40, PolicyName::BEST).unwrap();
    let mut run = Run::new(settings, ClusterShape { ranks: 4, redundant: 0 });
    let mut moved_at = Vec::new();
    for _ in 0..steps {
        let held: Vec<usize> = run.placement.layer(0).slots_of_rank(0).iter().map(|e| *e as usize).collect();
        if run.step(Phase::Decode, hot(&held)) {
            moved_at.push(run.step);
        }
    }
    moved_at
}

#[test]
fn load_that_turns_around_after_each_move_makes_few_moves() {
    let moved_at = haunted(Mode::Auto, 8000);
    let within = |steps: std::ops::Range<u64>| moved_at.iter().filter(|step| steps.contains(step)).count();
    assert!(moved_at.len() >= 3, "the load is worth moves: {moved_at:?}");
    assert!(within(0..1000) <= 5, "{moved_at:?}");
    assert!(within(3000..8000) <= 3, "{moved_at:?}");
    // Rests double while promises are broken, up to 64 windows.
    let rests: Vec<u64> = moved_at.windows(2).map(|pair| pair[1] - pair[0]).collect();
    assert!(rests.windows(2).all(|pair| pair[1] >= (2 * pair[0]).min(64 * 40)), "{rests:?}");
    // Somebody without patience moves all the time.
    let eager = haunted(Mode::Every(40), 1000);
    assert!(eager.len() >= 20, "{eager:?}");
}

#[test]
fn another_topic_is_followed() {
    let mut run = Run::auto(40);
    let served =
        |run: &mut Run, experts, steps| (0..steps).filter(|_| run.step(Phase::Decode, hot(experts))).count();
    assert_eq!(served(&mut run, &[4, 5], 200), 1);
    let changed = run.step;
    assert!(served(&mut run, &[2, 3, 6], 200) >= 1);
    let moved = run.verdicts.iter().filter(|v| v.target.is_some()).find(|v| v.step > changed).unwrap();
    assert!(moved.step <= changed + 40, "step {} for a change at {changed}", moved.step);
    let last = run.last();
    assert!(last.forecast.balance_before > 0.85, "{last:?}");
}

#[test]
fn noise_moves_nothing() {
    let mut run = Run::auto(32);
    let mut state = 1u64;
    for _ in 0..2000 {
        let mut tokens = [0; EXPERTS];
        for _ in 0..16 {
            state = state.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
            tokens[(state >> 33) as usize % EXPERTS] += 1;
        }
        run.step(Phase::Decode, tokens);
    }
    assert_eq!(run.moves(), 0, "{:?}", run.verdicts.iter().find(|v| v.target.is_some()));
    let floor = run.last().forecast.sampling_floor;
    assert!((0.3..0.6).contains(&floor), "sixteen tokens on four ranks: {floor}");
}

#[test]
fn moves_must_pay() {
    let mut run = Run::auto(40);
    run.inputs.migration_bytes_per_us = 1.0;
    for _ in 0..40 {
        run.step(Phase::Decode, hot(&[4, 5]));
    }
    assert_eq!(run.moves(), 0);
    let Verdict { reason, forecast, .. } = run.last();
    assert!(
        reason.starts_with("moving 2 layers does not pay: ") && reason.ends_with("of moving"),
        "{reason}"
    );
    assert!(forecast.gain_us_per_step * forecast.horizon_steps < 2.0 * forecast.cost_us, "{forecast:?}");
    // Where nothing is known of time, nothing pays.
    run.inputs.row_us = [0.0, 0.0];
    assert!(!run.look());
    assert_eq!(run.last().reason, "no plan serves the newest steps better");
}

#[test]
fn the_phase_that_takes_the_time_decides() {
    // Prefill heats one expert, decode another; there are slots for enough copies of one of them.
    let single = |hot| std::array::from_fn(|expert| if expert == hot { 560 } else { 20 });
    let slowest = |row_us: [f64; 2], phase: Phase| {
        let mut run = Run::auto(40);
        run.inputs.row_us = row_us;
        for i in 0..40 {
            match i % 2 {
                0 => run.step(Phase::Prefill, single(0)),
                _ => run.step(Phase::Decode, single(4)),
            };
        }
        let mut only = LoadWindow::new(&[0, 1], EXPERTS);
        (0..2)
            .for_each(|layer| only.counts_mut(phase, layer).copy_from_slice(run.counts.counts(phase, layer)));
        forecast::Forecaster::new(Split::Exact, [1.0, 1.0]).balance(&only, &run.placement).unwrap()
    };
    let decode_matters = slowest([1e-3, 10.0], Phase::Decode);
    let prefill_matters = slowest([10.0, 1e-3], Phase::Decode);
    assert!(decode_matters > 0.95 && prefill_matters < decode_matters, "{decode_matters} {prefill_matters}");
    assert!(slowest([10.0, 1e-3], Phase::Prefill) > 0.95);
}

#[test]
fn what_fails_is_tried_again_later() {
    let mut run = Run::auto(40);
    let mut tries = Vec::new();
    for _ in 0..1000 {
        (0..2).for_each(|layer| run.counts.add(Phase::Decode, layer, &hot(&[4, 5])));
        run.step += 1;
        match run.rebalancer.after_step() {
            Due::Nothing => {}
            Due::Part => run.rebalancer.end_part(run.step, &run.counts),
            Due::Look => {
                let verdict =
                    run.rebalancer.look(run.step, &run.counts, run.inputs, &run.placement).decide().unwrap();
                run.rebalancer.decided(&verdict);
                if verdict.target.is_some() {
                    assert!(run.rebalancer.is_busy());
                    tries.push(run.step);
                    run.rebalancer.failed(run.step);
                } else {
                    assert!(verdict.reason.contains("have failed: waiting until step"), "{}", verdict.reason);
                }
            }
        }
    }
    assert_eq!(tries, [10, 30, 70, 150, 310, 630]);
}

#[test]
fn an_operator_s_order_rests_too() {
    let mut run = Run::auto(40);
    (0..9).for_each(|_| {
        run.step(Phase::Decode, hot(&[4, 5]));
    });
    run.rebalancer.interrupted();
    (0..21).for_each(|_| assert!(!run.step(Phase::Decode, hot(&[4, 5]))));
    assert!(run.verdicts.is_empty(), "no look while somebody else moves experts");
    run.rebalancer.overruled(run.step);
    run.step(Phase::Decode, hot(&[4, 5]));
    assert!(run.last().reason.contains("resting until step 70"), "{}", run.last().reason);
    assert_eq!(run.last().forecast.achieved, None, "nobody promised anything");
}
