//! Sharing, eviction and leaks of KV blocks.

use super::*;
use proptest::prelude::*;

const SIZE: usize = 4;
const MLA: FormRules = FormRules { generated: true, long_above: None };

fn run(tokens: &[u32]) -> TokenRun<'_> {
    TokenRun { tokens, prompt_len: tokens.len(), rules: FormRules::default(), salt: None }
}

/// A table of computed and published tokens.
fn written(pool: &KvPool, run: TokenRun<'_>) -> BlockTable {
    let mut table = pool.open(run, run.tokens.len() - 1);
    assert!(table.grow(run.tokens.len()));
    table.publish(run);
    table
}

#[test]
fn equal_prefixes_share_full_blocks() {
    let pool = KvPool::new(8, SIZE, true);
    let first = written(&pool, run(&[1, 2, 3, 4, 5, 6, 7, 8, 9]));
    let second = pool.open(run(&[1, 2, 3, 4, 5, 6, 7, 0]), 8);
    assert_eq!(second.blocks(), &first.blocks()[..1]);
    assert_eq!(pool.cached_prefix(run(&[2, 2, 3, 4]), 4).blocks, 0);
    // The same tokens after another parent are another prefix.
    assert_eq!(pool.cached_prefix(run(&[5, 6, 7, 8]), 4).blocks, 0);
    pool.check(&[&first, &second]);
    drop((first, second));
    assert_eq!(pool.stats(), KvStats { used: 0, cached: 2, free: 6, evictions: 0 });
}

#[test]
fn a_limit_keeps_the_last_block_out() {
    let pool = KvPool::new(4, SIZE, true);
    drop(written(&pool, run(&[1, 2, 3, 4, 5, 6, 7, 8])));
    let again = [1, 2, 3, 4, 5, 6, 7, 8];
    assert_eq!(pool.open(run(&again), 7).blocks().len(), 1);
    assert_eq!(pool.open(run(&again), 8).blocks().len(), 2);
    assert_eq!(pool.cached_prefix(run(&again), 8), CachedPrefix { blocks: 2, unused: 2 });
}

#[test]
fn forms_are_part_of_the_key() {
    let pool = KvPool::new(4, SIZE, true);
    let tokens = [1, 2, 3, 4, 5];
    let of = |prompt_len| TokenRun { tokens: &tokens, prompt_len, rules: MLA, salt: None };
    drop(written(&pool, of(2)));
    assert_eq!(pool.cached_prefix(of(5), 4).blocks, 0);
    assert_eq!(pool.cached_prefix(of(3), 4).blocks, 0);
    assert_eq!(pool.cached_prefix(of(2), 4).blocks, 1);
}

#[test]
fn the_least_recently_used_goes_first_and_children_before_parents() {
    let pool = KvPool::new(4, SIZE, true);
    drop(written(&pool, run(&[1, 1, 1, 1, 2, 2, 2, 2])));
    drop(written(&pool, run(&[3, 3, 3, 3])));
    drop(pool.open(run(&[1, 1, 1, 1]), 4));
    // One block is free; the next one is the child of the ones.
    let mut table = pool.open(run(&[9]), 0);
    assert!(table.grow(2 * SIZE));
    assert_eq!(pool.cached_prefix(run(&[1, 1, 1, 1, 2, 2, 2, 2]), 8).blocks, 1);
    assert!(table.grow(3 * SIZE));
    assert_eq!(pool.cached_prefix(run(&[3, 3, 3, 3]), 4).blocks, 0);
    assert_eq!(pool.cached_prefix(run(&[1, 1, 1, 1]), 4).blocks, 1);
    assert!(!table.grow(5 * SIZE));
    assert_eq!(table.blocks().len(), 3);
    assert_eq!(pool.stats().evictions, 2);
    pool.check(&[&table]);
}

#[test]
fn twins_computed_at_the_same_time_become_one() {
    let pool = KvPool::new(8, SIZE, true);
    let tokens = [1, 2, 3, 4, 5, 6, 7, 8];
    let mut twins = [pool.open(run(&tokens), 7), pool.open(run(&tokens), 7)];
    for twin in &mut twins {
        assert!(twin.grow(8));
        twin.publish(run(&tokens));
    }
    assert_eq!(twins[0].blocks(), twins[1].blocks());
    assert_eq!(pool.stats().used, 2);
    pool.check(&[&twins[0], &twins[1]]);
}

#[test]
fn without_caching_nothing_stays() {
    let pool = KvPool::new(4, SIZE, false);
    drop(written(&pool, run(&[1, 2, 3, 4, 5])));
    assert_eq!(pool.stats(), KvStats { used: 0, cached: 0, free: 4, evictions: 0 });
}

/// What the test does next with one of its sequences.
#[derive(Debug, Clone)]
enum Op {
    /// Open a sequence with these tokens, the first few of them prompt.
    Open(Vec<u32>, usize),
    /// Compute up to so many more tokens of a sequence and publish them.
    Advance(usize, usize),
    /// Drop a sequence.
    Drop(usize),
}

fn op() -> impl Strategy<Value = Op> {
    // Two token values: equal prefixes are common.
    prop_oneof![
        (proptest::collection::vec(0u32..2, 1..30), 1usize..30).prop_map(|(tokens, p)| Op::Open(tokens, p)),
        (any::<usize>(), 1usize..12).prop_map(|(i, n)| Op::Advance(i, n)),
        any::<usize>().prop_map(Op::Drop),
    ]
}

struct Live {
    tokens: Vec<u32>,
    prompt_len: usize,
    computed: usize,
    table: BlockTable,
}

impl Live {
    /// Tokens and forms up to and including block `i`: all that its content depends on.
    fn prefix(&self, i: usize) -> Vec<(u32, TokenForm)> {
        (0..(i + 1) * SIZE).map(|p| (self.tokens[p], MLA.of(p, self.prompt_len))).collect()
    }
}

proptest! {
    /// Whatever happens, no block leaks, and a block found in the cache holds exactly the prefix asked for.
    #[test]
    fn random_life(ops in proptest::collection::vec(op(), 1..200), blocks in 1usize..20) {
        let pool = KvPool::new(blocks, SIZE, true);
        let mut live: Vec<Live> = Vec::new();
        // What was last computed into each block.
        let mut content: HashMap<u32, Vec<(u32, TokenForm)>> = HashMap::new();
        for op in ops {
            match op {
                Op::Open(tokens, prompt_len) => {
                    let prompt_len = prompt_len.min(tokens.len());
                    let full = TokenRun { tokens: &tokens, prompt_len, rules: MLA, salt: None };
                    let expected = pool.cached_prefix(full, tokens.len()).blocks;
                    let table = pool.open(full, tokens.len());
                    prop_assert_eq!(table.blocks().len(), expected);
                    let computed = table.blocks().len() * SIZE;
                    live.push(Live { tokens, prompt_len, computed, table });
                }
                Op::Advance(i, n) if !live.is_empty() => {
                    let i = i % live.len();
                    let end = (live[i].computed + n).min(live[i].tokens.len());
                    let available = pool.available();
                    let before = live[i].table.blocks().len();
                    let grown = live[i].table.grow(end);
                    prop_assert_eq!(grown, end.div_ceil(SIZE).saturating_sub(before) <= available);
                    if grown {
                        for block in live[i].computed / SIZE..end / SIZE {
                            content.insert(live[i].table.blocks()[block], live[i].prefix(block));
                        }
                        live[i].computed = end;
                        let tokens = live[i].tokens[..end].to_vec();
                        let run = TokenRun { tokens: &tokens, prompt_len: live[i].prompt_len, rules: MLA, salt: None };
                        live[i].table.publish(run);
                    }
                }
                Op::Drop(i) if !live.is_empty() => {
                    let i = i % live.len();
                    live.swap_remove(i);
                }
                Op::Advance(..) | Op::Drop(_) => {}
            }
            pool.check(&live.iter().map(|l| &l.table).collect::<Vec<_>>());
            for l in &live {
                for (i, block) in l.table.blocks().iter().enumerate().take(l.computed / SIZE) {
                    prop_assert_eq!(&content[block], &l.prefix(i));
                }
            }
        }
        live.clear();
        let stats = pool.stats();
        prop_assert_eq!((stats.used, stats.cached + stats.free), (0, blocks));
    }
}
