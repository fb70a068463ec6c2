//! The handshake itself, on buffers of our own: what is left in them afterwards goes on to the connection's records.

use std::{io, ops::Deref, sync::Arc};

use bytes::{Buf, BytesMut};
use rustls::{
    ClientConfig, Error, ExtractedSecrets, ServerConfig,
    client::{ClientConnectionData, UnbufferedClientConnection},
    kernel::KernelConnection,
    server::{ServerConnectionData, UnbufferedServerConnection},
    unbuffered::{
        ConnectionState, EncodeError, EncodeTlsData, InsufficientSizeError, ReadTraffic,
        UnbufferedConnectionCommon, UnbufferedStatus,
    },
};
use rustls_pki_types::ServerName;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::{
    handshake::{HandshakeError, peer_of},
    record::RecordKey,
    stream::{RecordStream, Rekey},
    verify::PeerIdentity,
};

/// The first read; a flight with a chain of certificates is a few of these.
const READ: usize = 4 * 1024;
/// More than rustls takes for one message of a handshake, which it refuses by itself.
const MAX_FLIGHT: usize = 128 * 1024;

/// One end of a handshake.
trait Side: Deref<Target = UnbufferedConnectionCommon<Self::Data>> {
    type Data: Send + Sync + 'static;

    fn process<'c, 'i>(
        &'c mut self,
        incoming: &'i mut [u8],
    ) -> UnbufferedStatus<'c, 'i, Self::Data>;

    fn into_keys(self) -> Result<(ExtractedSecrets, KernelConnection<Self::Data>), Error>;
}

impl Side for UnbufferedServerConnection {
    type Data = ServerConnectionData;

    fn process<'c, 'i>(
        &'c mut self,
        incoming: &'i mut [u8],
    ) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(incoming)
    }

    fn into_keys(self) -> Result<(ExtractedSecrets, KernelConnection<Self::Data>), Error> {
        self.dangerous_into_kernel_connection()
    }
}

impl Side for UnbufferedClientConnection {
    type Data = ClientConnectionData;

    fn process<'c, 'i>(
        &'c mut self,
        incoming: &'i mut [u8],
    ) -> UnbufferedStatus<'c, 'i, Self::Data> {
        self.process_tls_records(incoming)
    }

    fn into_keys(self) -> Result<(ExtractedSecrets, KernelConnection<Self::Data>), Error> {
        self.dangerous_into_kernel_connection()
    }
}

/// The accepting end of a TLS 1.3 connection. The configuration must allow its secrets to be extracted.
pub(super) async fn server<IO>(
    io: IO,
    config: Arc<ServerConfig>,
) -> Result<(RecordStream<IO>, PeerIdentity), HandshakeError>
where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    agree(io, UnbufferedServerConnection::new(config)?).await
}

/// The dialling end of a TLS 1.3 connection. The configuration must allow its secrets to be extracted.
pub(super) async fn client<IO>(
    io: IO,
    config: Arc<ClientConfig>,
    name: ServerName<'static>,
) -> Result<(RecordStream<IO>, PeerIdentity), HandshakeError>
where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    agree(io, UnbufferedClientConnection::new(config, name)?).await
}

async fn agree<S: Side, IO>(
    mut io: IO,
    mut side: S,
) -> Result<(RecordStream<IO>, PeerIdentity), HandshakeError>
where
    IO: AsyncRead + AsyncWrite + Unpin,
{
    let mut flight = Flight::default();
    loop {
        match flight.step(&mut side) {
            Ok(Step::Again) => {}
            Ok(Step::Done) => break,
            Ok(Step::Send) => flight.send(&mut io).await?,
            Ok(Step::Read) => flight.read(&mut io).await?,
            Err(error) => {
                flight.say_why(&mut side);
                // The error that is returned matters more than whether the peer could be told.
                let _ = flight.send(&mut io).await;
                return Err(error.into());
            }
        }
    }
    let peer = peer_of(side.peer_certificates())?;
    let (secrets, rekey) = side.into_keys()?;
    let (sequence, tx) = &secrets.tx;
    let tx = RecordKey::new(*sequence, tx)?;
    let (sequence, rx) = &secrets.rx;
    let rx = RecordKey::new(*sequence, rx)?;
    let rekey: Box<dyn Rekey> = Box::new(rekey);
    let stream = RecordStream::new(io, (tx, rx), rekey, (flight.early, flight.incoming));
    Ok((stream, peer))
}

/// What a handshake asks for next.
enum Step {
    Again,
    Send,
    Read,
    Done,
}

/// The bytes of a handshake under way.
#[derive(Default)]
struct Flight {
    incoming: BytesMut,
    outgoing: Vec<u8>,
    /// Content that came with the peer's last flight.
    early: BytesMut,
}

impl Flight {
    fn step<S: Side>(&mut self, side: &mut S) -> Result<Step, Error> {
        let UnbufferedStatus { discard, state } = side.process(&mut self.incoming);
        let step = state.map(|state| match state {
            ConnectionState::EncodeTlsData(mut message) => {
                encode(&mut message, &mut self.outgoing);
                Step::Again
            }
            ConnectionState::TransmitTlsData(flight) => {
                flight.done();
                Step::Send
            }
            ConnectionState::ReadTraffic(mut traffic) => {
                collect(&mut traffic, &mut self.early);
                Step::Again
            }
            ConnectionState::WriteTraffic(_) => Step::Done,
            // A peer that ends in its handshake shows as the end of its bytes.
            _ => Step::Read,
        });
        self.incoming.advance(discard);
        step
    }

    /// The alert of a handshake that failed.
    fn say_why<S: Side>(&mut self, side: &mut S) {
        if let Ok(ConnectionState::EncodeTlsData(mut alert)) =
            side.process(&mut self.incoming).state
        {
            encode(&mut alert, &mut self.outgoing);
        }
    }

    async fn send<IO: AsyncWrite + Unpin>(&mut self, io: &mut IO) -> Result<(), HandshakeError> {
        let outgoing = std::mem::take(&mut self.outgoing);
        io.write_all(&outgoing).await.map_err(HandshakeError::Io)?;
        io.flush().await.map_err(HandshakeError::Io)
    }

    async fn read<IO: AsyncRead + Unpin>(&mut self, io: &mut IO) -> Result<(), HandshakeError> {
        if self.incoming.len() > MAX_FLIGHT {
            return Err(Error::PeerSentOversizedRecord.into());
        }
        self.incoming.reserve(READ);
        match io.read_buf(&mut self.incoming).await {
            Ok(0) => Err(HandshakeError::Io(io::ErrorKind::UnexpectedEof.into())),
            Ok(_) => Ok(()),
            Err(error) => Err(HandshakeError::Io(error)),
        }
    }
}

fn encode<Data>(message: &mut EncodeTlsData<'_, Data>, outgoing: &mut Vec<u8>) {
    let end = outgoing.len();
    if let Err(EncodeError::InsufficientSize(InsufficientSizeError { required_size })) =
        message.encode(&mut [])
    {
        outgoing.resize(end + required_size, 0);
        // It fits now, and was not encoded before.
        let _ = message.encode(&mut outgoing[end..]);
    }
}

fn collect<Data>(traffic: &mut ReadTraffic<'_, '_, Data>, early: &mut BytesMut) {
    while let Some(Ok(record)) = traffic.next_record() {
        early.extend_from_slice(record.payload);
    }
}
