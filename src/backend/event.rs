//! A point in a rank's work that other ranks of the process can wait for, and what such work stands in line for.

use std::any::Any;

/// See [`super::Backend::record`]. Holds nothing where work is done as soon as a method returns.
#[derive(Default)]
pub struct Event {
    mark: Option<Box<dyn Any + Send + Sync>>,
}

impl Event {
    /// The backend's own mark, once there is one.
    ///
    /// # Panics
    /// When another kind of backend made it.
    pub fn get<T: Any>(&self) -> Option<&T> {
        let mark = self.mark.as_deref()?;
        Some(mark.downcast_ref().expect("an event of the same kind of backend"))
    }

    /// Keeps the backend's own mark.
    pub fn set<T: Any + Send + Sync>(&mut self, mark: T) {
        self.mark = Some(Box::new(mark));
    }
}

/// What a device's own libraries call a stream: a `cudaStream_t`, 0 where work is done as soon as a method returns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RawStream(pub usize);
