//! Deadlines and failures of all communicators of this process.
//!
//! An exchange on GPUs ends on the GPU, where nobody waits for it but the next `download`, and a dead peer leaves it spinning for
//! ever. So one thread looks at all links every now and then; when one has failed or is late, everything ends together: no result
//! of these backends counts any more, the hosts' meetings end, and every communicator is aborted, which frees the streams.

use std::sync::{Arc, Mutex, OnceLock, Weak};
use std::time::{Duration, Instant};

use super::Options;
use super::library::Library;
use super::link::{Link, Trouble};
use crate::comm::local::lock;

/// How often the links are looked at.
const PERIOD: Duration = Duration::from_millis(20);

/// What the links of this process share.
pub(super) struct Watch {
    pub library: Arc<Library>,
    pub options: Options,
    links: Mutex<Vec<Weak<Link>>>,
    failure: OnceLock<String>,
}

impl Watch {
    /// A watch with its thread, which ends with it.
    pub fn start(library: Arc<Library>, options: Options) -> Arc<Watch> {
        let watch = Arc::new(Watch { library, options, links: Mutex::default(), failure: OnceLock::new() });
        let seen = Arc::downgrade(&watch);
        let patrol = move || {
            while let Some(watch) = seen.upgrade() {
                watch.look(Instant::now());
                drop(watch);
                std::thread::sleep(PERIOD);
            }
        };
        std::thread::Builder::new()
            .name("nccl-watch".to_owned())
            .spawn(patrol)
            .expect("the system refuses one more thread");
        watch
    }

    /// Adds a link.
    pub fn add(&self, link: &Arc<Link>) {
        let mut links = lock(&self.links);
        links.retain(|link| link.strong_count() > 0);
        links.push(Arc::downgrade(link));
    }

    /// Why everything has ended, once it has.
    pub fn failure(&self) -> Option<&str> {
        self.failure.get().map(String::as_str)
    }

    /// Ends everything; the first reason given is the one told. `origin` is the link of the rank that failed by itself, if any.
    pub fn fail(&self, why: String, origin: Option<&Link>) {
        if self.failure.set(why).is_err() {
            return;
        }
        let why = self.failure().expect("set above");
        let links = self.live();
        // In this order: whoever is freed by an abort must find that nothing counts any more.
        for link in &links {
            link.condemn(why, origin.is_some_and(|origin| std::ptr::eq(origin, link.as_ref())));
        }
        for link in links {
            link.abort();
        }
    }

    /// Looks at every link once.
    pub fn look(&self, now: Instant) {
        if self.failure().is_some() {
            return;
        }
        for link in self.live() {
            if let Some(Trouble { why, own }) = link.trouble(now) {
                return self.fail(why, own.then_some(link.as_ref()));
            }
        }
    }

    fn live(&self) -> Vec<Arc<Link>> {
        lock(&self.links).iter().filter_map(Weak::upgrade).collect()
    }
}
