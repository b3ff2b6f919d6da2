//! The paged KV cache of one DP rank, as numbers: which block holds which tokens. No tensor, no clock.
//!
//! A [`BlockTable`] holds the blocks of one sequence and gives them back when dropped. A full block whose tokens are
//! computed can be published: it then serves every later sequence with the same prefix, and stays after its last holder
//! until its room is needed (least recently used first).
//!
//! A published block is keyed by its parent block and by the tokens and forms it holds, compared in full: a hash only
//! finds candidates and can never give a wrong prefix. The parent's block number is enough to stand for the whole chain
//! before it, because a block is never evicted before its published children:
//! * who holds a published block holds its parent (tables hold whole prefixes), and
//! * a table gives its blocks back last first, so a block is always less recently used than its parent.

use super::stats::KvStats;
use crate::model::{FormRules, TokenForm};
use std::cell::RefCell;
use std::collections::{HashMap, VecDeque};
use std::rc::Rc;
use std::sync::Arc;

/// The tokens of one sequence with what decides their forms.
#[derive(Debug, Clone, Copy)]
pub struct TokenRun<'a> {
    /// Prompt, then generated tokens.
    pub tokens: &'a [u32],
    /// Tokens of the prompt.
    pub prompt_len: usize,
    /// Forms the model distinguishes.
    pub rules: FormRules,
    /// Who may share its blocks: runs with the same salt.
    pub salt: Option<&'a Arc<str>>,
}

/// What one published block holds. Equal keys mean equal bits.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
struct BlockKey {
    /// The published block before this one; `None` at the start of a sequence.
    parent: Option<u32>,
    /// Of the run, in the first block only: the parents of the others stand for it.
    salt: Option<Arc<str>>,
    content: Vec<(u32, TokenForm)>,
}

impl BlockKey {
    /// Describes block `index` of a run.
    fn set(&mut self, parent: Option<u32>, run: TokenRun<'_>, index: usize, block_size: usize) {
        self.parent = parent;
        self.salt = run.salt.filter(|_| parent.is_none()).cloned();
        self.content.clear();
        let positions = index * block_size..(index + 1) * block_size;
        self.content.extend(positions.map(|p| (run.tokens[p], run.rules.of(p, run.prompt_len))));
    }
}

/// One block of the pool.
#[derive(Debug, Default)]
struct Block {
    /// Tables holding it.
    holders: u32,
    /// What it holds, once published.
    key: Option<Rc<BlockKey>>,
    /// Published blocks whose parent it is.
    children: u32,
    /// The latest entry of this block in [`Pool::unused`]; older entries are stale.
    stamp: u64,
}

#[derive(Debug)]
struct Pool {
    block_size: usize,
    /// Publish and look up; off with `--no-prefix-caching`.
    caching: bool,
    blocks: Vec<Block>,
    /// Blocks that hold nothing.
    free: Vec<u32>,
    index: HashMap<Rc<BlockKey>, u32>,
    /// (block, stamp) of published blocks without holders, least recently used first; stale entries are skipped.
    unused: VecDeque<(u32, u64)>,
    /// Published blocks without holders: the entries of `unused` that are not stale.
    cached: usize,
    next_stamp: u64,
    evictions: u64,
    /// Scratch for lookups.
    key: BlockKey,
}

/// The block pool of one DP rank. Clones are handles to the same pool.
#[derive(Debug, Clone)]
pub struct KvPool(Rc<RefCell<Pool>>);

/// Blocks that [`KvPool::open`] would find.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct CachedPrefix {
    /// All of them.
    pub blocks: usize,
    /// Those of them without a holder: taking them makes them unavailable to others.
    pub unused: usize,
}

/// The blocks of one sequence, position by position; given back on drop.
#[derive(Debug)]
pub struct BlockTable {
    blocks: Vec<u32>,
    /// Leading blocks that are published.
    published: usize,
    pool: KvPool,
}

impl KvPool {
    /// A pool of `blocks` empty blocks of `block_size` tokens.
    pub fn new(blocks: usize, block_size: usize, caching: bool) -> Self {
        assert!(block_size > 0 && blocks <= u32::MAX as usize, "{blocks} blocks of {block_size} tokens");
        KvPool(Rc::new(RefCell::new(Pool {
            block_size,
            caching,
            blocks: (0..blocks).map(|_| Block::default()).collect(),
            free: (0..blocks as u32).rev().collect(),
            index: HashMap::with_capacity(if caching { blocks } else { 0 }),
            unused: VecDeque::new(),
            cached: 0,
            next_stamp: 0,
            evictions: 0,
            key: BlockKey::default(),
        })))
    }

    /// Tokens per block.
    pub fn block_size(&self) -> usize {
        self.0.borrow().block_size
    }

    /// What published blocks hold of the first `limit` tokens of a run. Changes nothing.
    pub fn cached_prefix(&self, run: TokenRun<'_>, limit: usize) -> CachedPrefix {
        let mut pool = self.0.borrow_mut();
        let mut parent = None;
        let mut found = CachedPrefix::default();
        while let Some(block) = pool.lookup(parent, run, found.blocks, limit) {
            parent = Some(block);
            found.blocks += 1;
            found.unused += usize::from(pool.blocks[block as usize].holders == 0);
        }
        found
    }

    /// A table for a new sequence that starts with the published blocks of the first `limit` tokens of `run`.
    pub fn open(&self, run: TokenRun<'_>, limit: usize) -> BlockTable {
        let mut table = BlockTable { blocks: Vec::new(), published: 0, pool: self.clone() };
        let mut pool = self.0.borrow_mut();
        while let Some(block) = pool.lookup(table.blocks.last().copied(), run, table.blocks.len(), limit) {
            pool.hold(block);
            table.blocks.push(block);
        }
        table.published = table.blocks.len();
        drop(pool);
        table
    }

    /// Blocks that can be had: empty ones and those only kept for their prefix.
    pub fn available(&self) -> usize {
        let pool = self.0.borrow();
        pool.free.len() + pool.cached
    }

    /// Blocks by state.
    pub fn stats(&self) -> KvStats {
        let pool = self.0.borrow();
        KvStats {
            used: pool.blocks.len() - pool.free.len() - pool.cached,
            cached: pool.cached,
            free: pool.free.len(),
            evictions: pool.evictions,
        }
    }

    /// Asserts every invariant between the pool's parts and the tables that are out.
    ///
    /// # Panics
    /// When one is broken: a block leaked, is held twice, or was evicted before its children.
    pub fn check(&self, tables: &[&BlockTable]) {
        self.0.borrow().check(tables);
    }
}

impl BlockTable {
    /// Block numbers: position p is in block `blocks()[p / block_size]`.
    pub fn blocks(&self) -> &[u32] {
        &self.blocks
    }

    /// Makes room for positions `0..tokens`. `false`, and nothing changed, when the pool has not enough blocks.
    #[must_use]
    pub fn grow(&mut self, tokens: usize) -> bool {
        let mut pool = self.pool.0.borrow_mut();
        let missing = tokens.div_ceil(pool.block_size).saturating_sub(self.blocks.len());
        if missing > pool.free.len() + pool.cached {
            return false;
        }
        for _ in 0..missing {
            self.blocks.push(pool.take());
        }
        true
    }

    /// Publishes the full blocks of a run whose tokens are all computed. Where another sequence published the same
    /// prefix in the meantime, this table goes over to that copy and its own becomes free.
    pub fn publish(&mut self, computed: TokenRun<'_>) {
        let mut pool = self.pool.0.borrow_mut();
        if !pool.caching {
            return;
        }
        let full = computed.tokens.len() / pool.block_size;
        while self.published < full {
            let i = self.published;
            let parent = i.checked_sub(1).map(|p| self.blocks[p]);
            match pool.lookup(parent, computed, i, computed.tokens.len()) {
                Some(block) => {
                    pool.hold(block);
                    let own = std::mem::replace(&mut self.blocks[i], block);
                    pool.release(own);
                }
                None => pool.publish(self.blocks[i]),
            }
            self.published += 1;
        }
    }
}

impl Drop for BlockTable {
    fn drop(&mut self) {
        let mut pool = self.pool.0.borrow_mut();
        // Last first: see the module doc.
        for &block in self.blocks.iter().rev() {
            pool.release(block);
        }
    }
}

impl Pool {
    /// The published block number `index` of a run after `parent`. Leaves its key in the scratch.
    fn lookup(&mut self, parent: Option<u32>, run: TokenRun<'_>, index: usize, limit: usize) -> Option<u32> {
        let end = (index + 1) * self.block_size;
        if !self.caching || end > limit.min(run.tokens.len()) {
            return None;
        }
        self.key.set(parent, run, index, self.block_size);
        self.index.get(&self.key).copied()
    }

    /// Publishes a held block under the key that [`Pool::lookup`] has just not found.
    fn publish(&mut self, block: u32) {
        let key = Rc::new(self.key.clone());
        if let Some(parent) = key.parent {
            self.blocks[parent as usize].children += 1;
        }
        self.blocks[block as usize].key = Some(Rc::clone(&key));
        let before = self.index.insert(key, block);
        assert_eq!(before, None, "block {block} published twice");
    }

    /// A block for new tokens, held once. The caller has checked that there is one.
    fn take(&mut self) -> u32 {
        let block = self.free.pop().or_else(|| self.evict()).expect("blocks were counted before");
        self.blocks[block as usize].holders = 1;
        block
    }

    /// One more holder.
    fn hold(&mut self, number: u32) {
        let block = &mut self.blocks[number as usize];
        if block.holders == 0 {
            // Its entry in `unused` becomes stale.
            block.stamp = 0;
            self.cached -= 1;
        }
        block.holders += 1;
    }

    /// One holder less.
    fn release(&mut self, number: u32) {
        let block = &mut self.blocks[number as usize];
        assert!(block.holders > 0, "block {number} released more often than held");
        block.holders -= 1;
        if block.holders > 0 {
            return;
        }
        if block.key.is_none() {
            self.free.push(number);
            return;
        }
        self.next_stamp += 1;
        block.stamp = self.next_stamp;
        self.unused.push_back((number, self.next_stamp));
        self.cached += 1;
        self.forget_stale();
    }

    /// Keeps `unused` within twice the number of blocks, at constant cost per release.
    fn forget_stale(&mut self) {
        if self.unused.len() > 2 * self.blocks.len() {
            let blocks = &self.blocks;
            self.unused.retain(|&(number, stamp)| blocks[number as usize].stamp == stamp);
        }
    }

    /// Unpublishes the least recently used block without holders.
    fn evict(&mut self) -> Option<u32> {
        loop {
            let (number, stamp) = self.unused.pop_front()?;
            let block = &mut self.blocks[number as usize];
            if block.stamp != stamp {
                continue;
            }
            assert_eq!(block.children, 0, "block {number} is evicted before its children");
            block.stamp = 0;
            let key = block.key.take().expect("unused blocks are published");
            self.index.remove(&key);
            if let Some(parent) = key.parent {
                self.blocks[parent as usize].children -= 1;
            }
            self.cached -= 1;
            self.evictions += 1;
            return Some(number);
        }
    }

    fn check(&self, tables: &[&BlockTable]) {
        let mut holders = vec![0; self.blocks.len()];
        for table in tables {
            assert!(table.published <= table.blocks.len());
            for (i, &block) in table.blocks.iter().enumerate() {
                holders[block as usize] += 1;
                let published = self.blocks[block as usize].key.is_some();
                assert!(published || i >= table.published, "block {block} lost its key while held");
            }
        }
        let mut children = vec![0; self.blocks.len()];
        for key in self.blocks.iter().filter_map(|block| block.key.as_ref()) {
            if let Some(parent) = key.parent {
                assert!(self.blocks[parent as usize].key.is_some(), "parent {parent} is not published");
                children[parent as usize] += 1;
            }
        }
        let (mut free, mut cached) = (0, 0);
        for (number, block) in self.blocks.iter().enumerate() {
            assert_eq!(block.holders, holders[number], "holders of block {number}");
            assert_eq!(block.children, children[number], "children of block {number}");
            match (&block.key, block.holders) {
                (None, 0) => free += 1,
                (None, 1) => {}
                (None, n) => panic!("block {number} is shared by {n} without being published"),
                (Some(key), n) => {
                    assert_eq!(self.index.get(key), Some(&(number as u32)), "index of block {number}");
                    cached += usize::from(n == 0);
                }
            }
        }
        assert_eq!((self.free.len(), self.cached), (free, cached), "free and cached blocks");
        let live = self.unused.iter().filter(|&&(n, stamp)| self.blocks[n as usize].stamp == stamp);
        assert_eq!(live.count(), cached, "entries of the unused list");
    }
}

#[cfg(test)]
mod tests;
