from offsite.protos import transfer_pb2 as _transfer_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class TaskState(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    TASK_STATE_UNSPECIFIED: _ClassVar[TaskState]
    DOWNLOADING: _ClassVar[TaskState]
    LOADING: _ClassVar[TaskState]
    TRAINING: _ClassVar[TaskState]
    UPLOADING: _ClassVar[TaskState]
    REFUSED: _ClassVar[TaskState]
    FAILED: _ClassVar[TaskState]
    MEASURED: _ClassVar[TaskState]
    AWAITING_APPROVAL: _ClassVar[TaskState]

class Reason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    REASON_UNSPECIFIED: _ClassVar[Reason]
    BOUND_BASES: _ClassVar[Reason]
    BOUND_DATA: _ClassVar[Reason]
    BOUND_METHODS: _ClassVar[Reason]
    BOUND_MIN_STEPS: _ClassVar[Reason]
    BOUND_MAX_STEPS: _ClassVar[Reason]
    BOUND_MIN_BATCH_SIZE: _ClassVar[Reason]
    BOUND_MAX_BATCH_SIZE: _ClassVar[Reason]
    BOUND_MIN_ROWS: _ClassVar[Reason]
    BOUND_MAX_PASSES: _ClassVar[Reason]
    BOUND_MAX_LEARNING_RATE: _ClassVar[Reason]
    BOUND_MIN_GRADIENT_CLIPPING: _ClassVar[Reason]
    BOUND_MIN_LENGTH: _ClassVar[Reason]
    BOUND_MAX_LENGTH: _ClassVar[Reason]
    BOUND_MAX_ROUNDS: _ClassVar[Reason]
    BOUND_MAX_UPLOAD_MIB: _ClassVar[Reason]
    BOUND_MAX_BUNDLE_MIB: _ClassVar[Reason]
    BOUND_MAX_EMULATOR_PERPLEXITY: _ClassVar[Reason]
    BOUND_SUSPICIOUS: _ClassVar[Reason]
    BOUND_MIN_NOISE: _ClassVar[Reason]
    BOUND_CONTINUED: _ClassVar[Reason]
    BOUND_RETENTIONS: _ClassVar[Reason]
    BOUND_REPLAY_ROWS: _ClassVar[Reason]
    BOUND_APPROVE: _ClassVar[Reason]
    FAULT_INTERNAL: _ClassVar[Reason]
    FAULT_DATA: _ClassVar[Reason]
    FAULT_EMULATOR: _ClassVar[Reason]
    FAULT_ENGINE: _ClassVar[Reason]
    FAULT_MEMORY: _ClassVar[Reason]
    FAULT_KILLED: _ClassVar[Reason]
    FAULT_DISK: _ClassVar[Reason]
    FAULT_DIVERGED: _ClassVar[Reason]
    FAULT_TRANSFER: _ClassVar[Reason]
    FAULT_UPDATE: _ClassVar[Reason]
    FAULT_TASK: _ClassVar[Reason]
TASK_STATE_UNSPECIFIED: TaskState
DOWNLOADING: TaskState
LOADING: TaskState
TRAINING: TaskState
UPLOADING: TaskState
REFUSED: TaskState
FAILED: TaskState
MEASURED: TaskState
AWAITING_APPROVAL: TaskState
REASON_UNSPECIFIED: Reason
BOUND_BASES: Reason
BOUND_DATA: Reason
BOUND_METHODS: Reason
BOUND_MIN_STEPS: Reason
BOUND_MAX_STEPS: Reason
BOUND_MIN_BATCH_SIZE: Reason
BOUND_MAX_BATCH_SIZE: Reason
BOUND_MIN_ROWS: Reason
BOUND_MAX_PASSES: Reason
BOUND_MAX_LEARNING_RATE: Reason
BOUND_MIN_GRADIENT_CLIPPING: Reason
BOUND_MIN_LENGTH: Reason
BOUND_MAX_LENGTH: Reason
BOUND_MAX_ROUNDS: Reason
BOUND_MAX_UPLOAD_MIB: Reason
BOUND_MAX_BUNDLE_MIB: Reason
BOUND_MAX_EMULATOR_PERPLEXITY: Reason
BOUND_SUSPICIOUS: Reason
BOUND_MIN_NOISE: Reason
BOUND_CONTINUED: Reason
BOUND_RETENTIONS: Reason
BOUND_REPLAY_ROWS: Reason
BOUND_APPROVE: Reason
FAULT_INTERNAL: Reason
FAULT_DATA: Reason
FAULT_EMULATOR: Reason
FAULT_ENGINE: Reason
FAULT_MEMORY: Reason
FAULT_KILLED: Reason
FAULT_DISK: Reason
FAULT_DIVERGED: Reason
FAULT_TRANSFER: Reason
FAULT_UPDATE: Reason
FAULT_TASK: Reason

class TaskKey(_message.Message):
    __slots__ = ("run", "round", "attempt")
    RUN_FIELD_NUMBER: _ClassVar[int]
    ROUND_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    run: str
    round: int
    attempt: int
    def __init__(self, run: _Optional[str] = ..., round: _Optional[int] = ..., attempt: _Optional[int] = ...) -> None: ...

class EnrolRequest(_message.Message):
    __slots__ = ("version", "policy", "examples")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    POLICY_FIELD_NUMBER: _ClassVar[int]
    EXAMPLES_FIELD_NUMBER: _ClassVar[int]
    version: str
    policy: str
    examples: int
    def __init__(self, version: _Optional[str] = ..., policy: _Optional[str] = ..., examples: _Optional[int] = ...) -> None: ...

class EnrolReply(_message.Message):
    __slots__ = ("site", "report_every_s")
    SITE_FIELD_NUMBER: _ClassVar[int]
    REPORT_EVERY_S_FIELD_NUMBER: _ClassVar[int]
    site: str
    report_every_s: float
    def __init__(self, site: _Optional[str] = ..., report_every_s: _Optional[float] = ...) -> None: ...

class PullTaskRequest(_message.Message):
    __slots__ = ("wait_s",)
    WAIT_S_FIELD_NUMBER: _ClassVar[int]
    wait_s: float
    def __init__(self, wait_s: _Optional[float] = ...) -> None: ...

class PullTaskReply(_message.Message):
    __slots__ = ("task", "signature")
    TASK_FIELD_NUMBER: _ClassVar[int]
    SIGNATURE_FIELD_NUMBER: _ClassVar[int]
    task: bytes
    signature: bytes
    def __init__(self, task: _Optional[bytes] = ..., signature: _Optional[bytes] = ...) -> None: ...

class UploadHeader(_message.Message):
    __slots__ = ("key", "digest", "size", "metrics")
    KEY_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    METRICS_FIELD_NUMBER: _ClassVar[int]
    key: TaskKey
    digest: str
    size: int
    metrics: str
    def __init__(self, key: _Optional[_Union[TaskKey, _Mapping]] = ..., digest: _Optional[str] = ..., size: _Optional[int] = ..., metrics: _Optional[str] = ...) -> None: ...

class UploadState(_message.Message):
    __slots__ = ("kept", "digest")
    KEPT_FIELD_NUMBER: _ClassVar[int]
    DIGEST_FIELD_NUMBER: _ClassVar[int]
    kept: int
    digest: str
    def __init__(self, kept: _Optional[int] = ..., digest: _Optional[str] = ...) -> None: ...

class UploadPart(_message.Message):
    __slots__ = ("offset", "data", "header")
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    HEADER_FIELD_NUMBER: _ClassVar[int]
    offset: int
    data: bytes
    header: UploadHeader
    def __init__(self, offset: _Optional[int] = ..., data: _Optional[bytes] = ..., header: _Optional[_Union[UploadHeader, _Mapping]] = ...) -> None: ...

class ReportRequest(_message.Message):
    __slots__ = ("key", "state", "step", "steps", "loss", "bytes_down", "reason", "usage", "lines", "exam")
    KEY_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    LOSS_FIELD_NUMBER: _ClassVar[int]
    BYTES_DOWN_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    USAGE_FIELD_NUMBER: _ClassVar[int]
    LINES_FIELD_NUMBER: _ClassVar[int]
    EXAM_FIELD_NUMBER: _ClassVar[int]
    key: TaskKey
    state: TaskState
    step: int
    steps: int
    loss: float
    bytes_down: int
    reason: Reason
    usage: Usage
    lines: _containers.RepeatedScalarFieldContainer[str]
    exam: str
    def __init__(self, key: _Optional[_Union[TaskKey, _Mapping]] = ..., state: _Optional[_Union[TaskState, str]] = ..., step: _Optional[int] = ..., steps: _Optional[int] = ..., loss: _Optional[float] = ..., bytes_down: _Optional[int] = ..., reason: _Optional[_Union[Reason, str]] = ..., usage: _Optional[_Union[Usage, _Mapping]] = ..., lines: _Optional[_Iterable[str]] = ..., exam: _Optional[str] = ...) -> None: ...

class Usage(_message.Message):
    __slots__ = ("memory_bytes", "cpu_s", "gpu_bytes")
    MEMORY_BYTES_FIELD_NUMBER: _ClassVar[int]
    CPU_S_FIELD_NUMBER: _ClassVar[int]
    GPU_BYTES_FIELD_NUMBER: _ClassVar[int]
    memory_bytes: int
    cpu_s: float
    gpu_bytes: int
    def __init__(self, memory_bytes: _Optional[int] = ..., cpu_s: _Optional[float] = ..., gpu_bytes: _Optional[int] = ...) -> None: ...

class ReportReply(_message.Message):
    __slots__ = ("stop",)
    STOP_FIELD_NUMBER: _ClassVar[int]
    stop: bool
    def __init__(self, stop: _Optional[bool] = ...) -> None: ...

class LeaveRequest(_message.Message):
    __slots__ = ("run", "reason")
    RUN_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    run: str
    reason: str
    def __init__(self, run: _Optional[str] = ..., reason: _Optional[str] = ...) -> None: ...

class LeaveReply(_message.Message):
    __slots__ = ("runs",)
    RUNS_FIELD_NUMBER: _ClassVar[int]
    runs: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, runs: _Optional[_Iterable[str]] = ...) -> None: ...
