//! Sockets: accepting, hyper's limits, and a graceful end.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use axum::Router;
use http::header::{CONNECTION, HeaderValue};
use http::{Request, Response};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::server::graceful::{GracefulConnection, GracefulShutdown};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior, interval, sleep, timeout};
use tower::ServiceExt;

use super::auth::Peer;
use super::gate::Gate;
use super::options::ServerOptions;
use super::routes;
use super::shutdown::Stage;
use super::state::AppState;
use super::unread::Watched;
use crate::error::{Error, Result};

/// Pause after a failed accept: the usual cause is the limit on open files, and only time helps.
const ACCEPT_BACKOFF: Duration = Duration::from_millis(50);
/// After aborting, connections may take so many of these pauses to send their last bytes. Counted, not timed: where the system
/// lets this process wait, they become longer.
const LAST_WORDS: (u32, Duration) = (50, Duration::from_millis(10));
/// How often histograms are folded and the engine's pulse is felt.
const TICK: Duration = Duration::from_secs(1);
/// hyper reads no more ahead, and accepts no smaller buffer.
const MIN_READ_AHEAD: usize = 8192;

/// Opens the listening socket.
///
/// # Errors
/// [`Error::Io`] naming the address: in use, not permitted, not of this machine.
pub async fn bind(host: &str, port: u16) -> Result<TcpListener> {
    TcpListener::bind((host, port)).await.map_err(|source| Error::io(format!("{host}:{port}"), source))
}

/// Serves until a shutdown: takes connections, and once the shutdown begins lets running requests finish for up to
/// [`super::ServerOptions::drain_timeout`], then aborts them. The engine is left to the caller.
///
/// # Errors
/// [`Error::Stopped`] when the engine died, whoever ended the server.
pub async fn serve(listener: TcpListener, state: AppState) -> Result<()> {
    let state = Arc::new(state);
    let mut background = JoinSet::new();
    background.spawn(keep_house(Arc::clone(&state)));
    let server = Server { router: routes::router(Arc::clone(&state)), state };
    let graceful = GracefulShutdown::new();
    tokio::select! {
        never = server.accept_all(&listener, &graceful) => match never {},
        () = server.state.shutdown.reached(Stage::Draining) => {}
        () = engine_death(&server.state) => {}
    }
    server.state.shutdown.advance(Stage::Draining);
    server.drain(&listener, graceful).await;
    match server.state.engine.is_alive() {
        true => Ok(()),
        false => Err(Error::Stopped("see the log for the reason".into())),
    }
}

struct Server {
    state: Arc<AppState>,
    router: Router,
}

impl Server {
    async fn accept_all(&self, listener: &TcpListener, graceful: &GracefulShutdown) -> Infallible {
        loop {
            let socket = accept(listener).await;
            // A drain may have begun while this task waited; a watched connection would be closed as idle, unanswered.
            let serving = self.state.shutdown.stage() == Stage::Serving;
            let connection = connection(socket, &self.router, &self.state.options, serving);
            if serving {
                tokio::spawn(finish(graceful.watch(connection)));
            } else {
                tokio::spawn(finish(connection));
            }
        }
    }

    /// Lets the watched connections end. New ones are answered meanwhile (health checks see the drain, clients their
    /// 503), one request each, but nobody waits for them.
    async fn drain(&self, listener: &TcpListener, graceful: GracefulShutdown) {
        let shutdown = &self.state.shutdown;
        let mut ended = pin!(graceful.shutdown());
        let refuse_others = async {
            loop {
                let accepted = accept(listener).await;
                tokio::spawn(finish(connection(accepted, &self.router, &self.state.options, false)));
            }
        };
        tokio::select! {
            () = &mut ended => return,
            () = sleep(self.state.options.drain_timeout) => {}
            () = shutdown.reached(Stage::Aborting) => {}
            () = refuse_others => {}
        }
        shutdown.advance(Stage::Aborting);
        let (pauses, pause) = LAST_WORDS;
        for _ in 0..pauses {
            if timeout(pause, ended.as_mut()).await.is_ok() {
                return;
            }
        }
        tracing::warn!("connections were still open at the end of the shutdown");
    }
}

/// Answers while `loading` runs, so that probes see a live process that is not ready instead of a closed port; returns
/// what it returns. Every request but a health probe is told to come back.
pub async fn while_loading<T>(
    listener: &TcpListener,
    options: &ServerOptions,
    loading: impl Future<Output = T>,
) -> T {
    let router = routes::while_loading();
    let mut loading = pin!(loading);
    loop {
        tokio::select! {
            loaded = &mut loading => return loaded,
            accepted = accept(listener) => {
                tokio::spawn(finish(connection(accepted, &router, options, false)));
            }
        }
    }
}

/// One connection under hyper's limits; each of its requests knows who sends it.
fn connection(
    (socket, peer): (TcpStream, SocketAddr),
    router: &Router,
    options: &ServerOptions,
    keep_alive: bool,
) -> impl GracefulConnection<Error = hyper::Error> + Send + 'static + use<> {
    let gate = Gate::new(socket, options);
    let (router, refusals) = (router.clone(), gate.refusals());
    let requests = AtomicU64::new(0);
    // hyper calls it for one request after the other, in their order.
    let service = service_fn(move |mut request: Request<Incoming>| {
        refusals.mark(requests.fetch_add(1, Ordering::Relaxed), &mut request);
        request.extensions_mut().insert(Peer(peer));
        answer(router.clone(), request)
    });
    http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(options.header_read_timeout)
        // What comes through the gate fits.
        .max_headers(options.max_headers)
        .max_buf_size(options.max_header_bytes.max(MIN_READ_AHEAD) + 1)
        .keep_alive(keep_alive)
        .serve_connection(TokioIo::new(gate), service)
}

/// The answer to one request. Where it comes before the request's body, what follows could not be told from that body: it says
/// that the connection ends with it.
async fn answer(
    router: Router,
    request: Request<Incoming>,
) -> std::result::Result<Response<axum::body::Body>, Infallible> {
    let (parts, body) = request.into_parts();
    let (body, progress) = Watched::new(body);
    let mut response = router.oneshot(Request::from_parts(parts, body)).await?;
    if progress.is_unfinished() {
        response.headers_mut().insert(CONNECTION, HeaderValue::from_static("close"));
    }
    Ok(response)
}

/// The next connection, whatever it takes.
async fn accept(listener: &TcpListener) -> (TcpStream, SocketAddr) {
    loop {
        match listener.accept().await {
            Ok((socket, peer)) => {
                // Tokens are small and must not wait for more of them. Failing to say so only costs latency.
                let _ = socket.set_nodelay(true);
                return (socket, peer);
            }
            Err(error) => {
                tracing::warn!("accepting a connection failed: {error}");
                sleep(ACCEPT_BACKOFF).await;
            }
        }
    }
}

/// A connection's end. Errors are the client's doing (it left, or sent no HTTP) and have been answered where possible.
async fn finish(connection: impl Future<Output = hyper::Result<()>>) {
    if let Err(error) = connection.await {
        tracing::debug!("connection ended: {error}");
    }
}

/// Returns some time after the engine has died: clients get their errors first.
async fn engine_death(state: &AppState) {
    let mut ticks = interval(TICK);
    while state.engine.is_alive() {
        ticks.tick().await;
    }
    sleep(state.options.dead_engine_grace).await;
}

/// Folds histogram samples and closes load windows on time, whether or not anybody reads the metrics.
async fn keep_house(state: Arc<AppState>) {
    let mut ticks = interval(TICK);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut window_began = Instant::now();
    loop {
        ticks.tick().await;
        state.metrics.run_upkeep();
        let rebalancing = state.engine.rebalance_status();
        state.metrics.note_rebalancing(&rebalancing);
        if let Some(experts) = &state.experts {
            experts.tick(std::time::Instant::now(), &rebalancing);
        }
        if window_began.elapsed() >= state.options.load_window {
            window_began = Instant::now();
            state.metrics.close_load_window();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_port_in_use_is_an_error_with_the_address() {
        let first = bind("127.0.0.1", 0).await.unwrap();
        let port = first.local_addr().unwrap().port();
        let error = bind("127.0.0.1", port).await.unwrap_err().to_string();
        assert!(error.starts_with(&format!("127.0.0.1:{port}: ")), "{error}");
    }
}
