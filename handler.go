// handler.go: where events go: the scripts that run on them, and the feed of the commands that read them.
//
// A handler is one -event-handler spec with a queue of its own: events wait in order, and one run at a time takes
// what waited together. Scripts are not trusted: one may hang, fork, print for ever or ignore TERM, and delays only
// itself. Nothing of the protocol is known here.

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
)

const (
	queueLimit = 4096             // events that may wait for one handler, or one command
	outputKept = 8 << 10          // bytes of a run's output that are logged
	slowAfter  = 10 * time.Second // a run that takes longer is one WARN
	killAfter  = 5 * time.Second  // between TERM and KILL
	// closeKillAfter is killAfter once the agent stops, whose end is waited for.
	closeKillAfter = time.Second
	// stdinAfter is how much longer than a script its stdin may last, which a child in the background may hold open.
	stdinAfter = 100 * time.Millisecond
	maxPipe    = 1 << 20 // bytes that a pipe holds at most
)

// handlerConfig says what runs when, and how.
type handlerConfig struct {
	specs   []string        // -event-handler values
	timeout time.Duration   // of one run; 0: none
	grace   time.Duration   // what close leaves to running handlers
	env     func() []string // added to the agent's environment; asked at each run
	log     logger
	shell   string // "": /bin/sh
}

// handlers are all handlers of one agent.
type handlers struct {
	cfg     handlerConfig
	all     atomic.Pointer[[]*handler] // as of the last reload
	timeout atomic.Int64               // of one run, the same
	ending  context.Context            // done: what still runs is ended, and nothing new is taken
	end     context.CancelCauseFunc
	workers sync.WaitGroup
}

type handler struct {
	handlers *handlers
	spec     string // the spec, for the log
	events   []string
	script   string
	argv     []string

	mu           sync.Mutex // guards what follows
	queue        []delivery
	dropped      int       // since the last run
	droppedTotal int       // in all
	last         string    // how the last run ended
	runningSince time.Time // zero: no worker takes what is queued
}

// delivery is an event on its way to a handler or a command.
type delivery struct {
	ev     Event
	at     time.Time           // when it came
	answer func(reply, []byte) // of a query, for the handler that answers it
}

// ---- specs ----

func newHandlers(cfg handlerConfig) (*handlers, error) {
	if cfg.shell == "" {
		cfg.shell = "/bin/sh"
	}
	hs := &handlers{cfg: cfg}
	hs.all.Store(new([]*handler))
	hs.ending, hs.end = context.WithCancelCause(context.Background())
	return hs, hs.reload(cfg)
}

// reload replaces the handlers by those of cfg. One that stays goes on with what it has queued; one that goes ends what
// it has queued, and gets nothing new. An error changes nothing.
func (hs *handlers) reload(cfg handlerConfig) error {
	old := slices.Clone(*hs.all.Load())
	var all []*handler
	for _, spec := range cfg.specs {
		h, err := newHandler(spec, hs.cfg.shell)
		if err != nil {
			return fmt.Errorf("event handler %q: %w", spec, err)
		}
		h.handlers = hs
		same := func(o *handler) bool { return o.script == h.script && slices.Equal(o.events, h.events) }
		if at := slices.IndexFunc(old, same); at >= 0 {
			h = old[at]
			old = slices.Delete(old, at, at+1)
		}
		all = append(all, h)
	}
	hs.all.Store(&all)
	hs.timeout.Store(int64(cfg.timeout))
	return nil
}

// newHandler parses the value of -event-handler.
func newHandler(spec, shell string) (*handler, error) {
	events, script, err := splitSpec(spec)
	if err != nil {
		return nil, err
	}
	argv, err := commandLine(script, shell)
	if err != nil {
		return nil, err
	}
	return &handler{spec: oneLine(spec), events: events, script: script, argv: argv, last: "never"}, nil
}

// splitSpec splits "event[,event...]=script". A script alone runs on every event.
func splitSpec(spec string) (events []string, script string, err error) {
	list, script, hasEvents := strings.Cut(spec, "=")
	if !hasEvents {
		// A list of events whose script was forgotten, or cut at its commas, would only fail later as a script.
		if checkEvents(strings.Split(spec, ",")) == nil {
			return nil, "", fmt.Errorf("there is no script; write %s=SCRIPT", spec)
		}
		list = "*"
		script = spec
	}

	if strings.TrimSpace(script) == "" {
		return nil, "", errors.New("the script is empty")
	}
	events = strings.Split(list, ",")
	return events, script, checkEvents(events)
}

// commandLine returns how script is run: by the shell, if there is one.
func commandLine(script, shell string) ([]string, error) {
	if _, err := exec.LookPath(shell); err == nil {
		return []string{shell, "-c", script}, nil
	}
	// In an image built from scratch a program with plain arguments must do.
	words := strings.Fields(script)
	if strings.ContainsAny(script, shellSyntax) || strings.Contains(words[0], "=") {
		return nil, fmt.Errorf("the script needs a shell, and there is no %s here; "+
			"only a program with plain arguments can run", shell)
	}
	return words, nil
}

// shellSyntax are the characters that would mean something to a shell.
const shellSyntax = "|&;<>()$`\\\"'*?[]{}~#!\n"

func checkEvents(events []string) error {
	for _, ev := range events {
		if !isEvent(ev) {
			return fmt.Errorf("unknown event %.60q; there are %s, user:NAME, query:NAME and * "+
				"(a script that holds a '=' is written *=SCRIPT)", ev, strings.Join(eventNames[1:], ", "))
		}
	}
	return nil
}

// isEvent reports whether ev can stand for events in a spec.
func isEvent(ev string) bool {
	if ev == "*" {
		return true
	}
	kind, name, hasName := strings.Cut(ev, ":")
	if hasName {
		return name != "" && (kind == eventUser.String() || kind == eventQuery.String())
	}
	return slices.Contains(eventNames[1:], kind)
}

// matches reports whether events, as in a spec, hold that of kind and name.
func matches(events []string, kind eventKind, name string) bool {
	return slices.ContainsFunc(events, func(ev string) bool {
		return ev == "*" || ev == kind.String() || ev == kind.String()+":"+name
	})
}

// warnf logs a warning about the handler.
func (h *handler) warnf(format string, args ...any) {
	h.handlers.cfg.log.printf(levelWarn, "handler '%s' %s", h.spec, fmt.Sprintf(format, args...))
}

// ---- queues ----

// deliver queues ev for every handler that it matches. It never blocks.
func (hs *handlers) deliver(ev Event, answer func(reply, []byte)) {
	d := delivery{ev: ev, at: time.Now()}
	if ev.kind == eventQuery {
		d.answer = answer
	}

	for _, h := range *hs.all.Load() {
		if hs.ending.Err() == nil && matches(h.events, ev.kind, ev.Name) {
			h.enqueue(d)
			d.answer = nil // the first handler that a query finds answers it
		}
	}
	if d.answer != nil {
		go answer(replyNothing, nil)
	}
}

func (h *handler) enqueue(d delivery) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if d.ev.Coalesce {
		// Of events that coalesce the one that came last counts: those of one sender come in the order in which they were
		// sent, and those of several have none.
		isReplaced := func(q delivery) bool { return q.ev.Coalesce && q.ev.Name == d.ev.Name }
		if at := slices.IndexFunc(h.queue, isReplaced); at >= 0 {
			h.queue = slices.Delete(h.queue, at, at+1)
		}
	}

	if len(h.queue) == queueLimit {
		h.queue = h.queue[1:]
		h.droppedTotal++
		h.dropped++
		if h.dropped == 1 {
			h.warnf("is behind: %d events wait, dropping the oldest", queueLimit)
		}
	}
	h.queue = append(h.queue, d)
	if h.runningSince.IsZero() {
		h.runningSince = time.Now()
		h.handlers.workers.Go(h.work)
	}
}

// take removes and returns what the next run is about. When nothing waits it returns nil, and the worker has to stop.
func (h *handler) take() []delivery {
	h.mu.Lock()
	defer h.mu.Unlock()
	if len(h.queue) == 0 {
		h.runningSince = time.Time{}
		h.queue = nil // lets go of what a burst has taken
		return nil
	}
	if h.dropped > 0 {
		h.warnf("was behind: %d events dropped", h.dropped)
		h.dropped = 0
	}

	// Consecutive member events of one kind are one run, each user event and each query is one of its own.
	h.runningSince = time.Now()
	n := 1
	kind := h.queue[0].ev.kind
	for kind < eventUser && n < len(h.queue) && h.queue[n].ev.kind == kind {
		n++
	}
	batch := h.queue[:n:n]
	h.queue = h.queue[n:]
	return batch
}

// info returns what is known of the handlers: group, key, value; and so on. The scripts of one event share its key.
func (hs *handlers) info() (facts []string) {
	add := func(key, value string) {
		for i := 0; i < len(facts); i += 3 {
			if facts[i+1] == key {
				facts[i+2] += ", " + value
				return
			}
		}
		facts = append(facts, "event_handlers", key, value)
	}
	for _, h := range *hs.all.Load() {
		for _, ev := range h.events { // as Serf names them
			kind, name, _ := strings.Cut(ev, ":")
			add(kind+":"+name, h.script)
		}

		events := strings.Join(h.events, ",")
		h.mu.Lock()
		add(events+" waiting", strconv.Itoa(len(h.queue)))
		add(events+" dropped", strconv.Itoa(h.droppedTotal))
		add(events+" last run", h.last)
		if !h.runningSince.IsZero() {
			add(events+" running since", h.runningSince.Format(time.DateTime))
		}
		h.mu.Unlock()
	}
	return facts
}

// work runs what is queued until nothing is.
func (h *handler) work() {
	for {
		batch := h.take()
		if batch == nil {
			return
		}
		first := batch[0]
		answerWithin := time.Duration(first.ev.Timeout) * ms
		tooLate := first.ev.kind == eventQuery && time.Since(first.at) >= answerWithin
		if !tooLate {
			h.run(batch)
		}
	}
}

// close stops the handlers: what runs, and then the last events, have the grace to end; then their groups are
// ended. All else that waits is dropped.
func (hs *handlers) close(last ...Event) {
	for _, h := range *hs.all.Load() {
		h.mu.Lock()
		h.queue = nil
		h.mu.Unlock()
	}
	for _, ev := range last {
		hs.deliver(ev, nil)
	}
	waitAtMost(hs.cfg.grace, hs.workers.Wait)
	hs.end(errors.New("ended with the agent"))
	waitAtMost(5*closeKillAfter, hs.workers.Wait) // a process that hangs in the kernel survives even KILL
}

// ---- runs ----

// run runs the handler's script once, to its end or its timeout, and reports the result.
func (h *handler) run(batch []delivery) {
	first := batch[0]
	started := time.Now()
	slow := time.AfterFunc(slowAfter, func() {
		h.warnf("has been running for %v, since %s: its other events wait", slowAfter, started.Format(time.DateTime))
	})

	var printed, answer outputCapture // answer: what a query's handler prints to stdout
	status := h.runScript(batch, &printed, &answer)
	slow.Stop()

	end := "well"
	if status != "" {
		end = status
	}
	end += fmt.Sprintf(" after %v", time.Since(started).Round(time.Millisecond))
	h.mu.Lock()
	h.last = end + ", " + started.Format(time.DateTime)
	h.mu.Unlock()

	output := string(answer.last) + string(printed.last)
	h.handlers.cfg.log.printf(levelDebug, "Event '%s' script output: %s", first.ev.kind, output)
	if status != "" {
		h.warnf("failed on %s: %s: %s", oneLine(first.ev.title()), end, lastLine(output))
	}

	if first.answer != nil {
		first.answer(replyTo(status, &printed, &answer))
	}
}

// title returns the event as a spec has it, such as user:deploy.
func (ev Event) title() string {
	if ev.Name == "" {
		return ev.kind.String()
	}
	return ev.kind.String() + ":" + ev.Name
}

func lastLine(output string) string {
	output = strings.TrimSpace(output)
	if output == "" {
		return "(no output)"
	}
	return oneLine(output[strings.LastIndex(output, "\n")+1:])
}

// replyTo returns the reply to a query: what was printed to stdout or, where the script has failed, its status and all
// that it printed. What does not fit is cut, and the reply says so.
func replyTo(status string, printed, answer *outputCapture) (reply, []byte) {
	kind := replyDone
	text := string(answer.first)
	size := answer.size
	if status != "" {
		kind = replyFailed
		text = status + "\n" + text + string(printed.first)
		size += len(status) + 1 + printed.size
	}
	if size > maxPayload {
		note := fmt.Sprintf("... (cut: %d bytes)\n", size)
		text = text[:maxPayload-len(note)] + note
	}
	return kind, []byte(text)
}

// runScript runs the script in a process group of its own. The status says how it failed, if it did.
func (h *handler) runScript(batch []delivery, printed, answer *outputCapture) (status string) {
	// This is what limits a run: once ctx is done, Cancel ends the whole process group.
	ctx := h.handlers.ending
	if timeout := time.Duration(h.handlers.timeout.Load()); timeout > 0 {
		limited, cancel := context.WithTimeoutCause(ctx, timeout, errors.New("timed out"))
		defer cancel()
		ctx = limited
	}

	cmd := exec.CommandContext(ctx, h.argv[0], h.argv[1:]...)
	cmd.Cancel = func() error {
		endGroup(cmd.Process.Pid, h.handlers.ending)
		return nil
	}
	cmd.WaitDelay = stdinAfter
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Env = h.environ(batch[0].ev)
	cmd.Stdin = strings.NewReader(stdinFor(batch))

	stdout := printed
	err := printed.open()
	if batch[0].answer != nil && err == nil {
		stdout = answer
		err = answer.open()
	}
	if err == nil {
		cmd.Stdout = stdout.w
		cmd.Stderr = printed.w
		err = cmd.Run()
	}
	printed.close()
	answer.close()

	if err == nil || errors.Is(err, exec.ErrWaitDelay) {
		return ""
	}
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	if cmd.Process == nil {
		return fmt.Sprintf("cannot start: %v", err)
	}
	if ctx.Err() != nil {
		return fmt.Sprintf("%v, %v", err, cmd.ProcessState)
	}
	return err.Error()
}

// endGroup ends a process group: TERM, then KILL for what is still there, the leader or what it left behind.
func endGroup(pgid int, ending context.Context) {
	syscall.Kill(-pgid, syscall.SIGTERM)

	// One process of the group is watched. Another one is searched for only when that has ended: a search goes through
	// every process of the host.
	survivor := pgid
	for began := time.Now(); syscall.Kill(-pgid, 0) == nil; time.Sleep(5 * time.Millisecond) {
		if !runsInGroup(survivor, pgid) {
			survivor = findInGroup(pgid)
		}
		if survivor == 0 {
			return // only zombies are left
		}
		took := time.Since(began)
		if took > killAfter || took > closeKillAfter && ending.Err() != nil {
			break
		}
	}

	syscall.Kill(-pgid, syscall.SIGKILL)
}

// runsInGroup reports whether a process is of the group and no zombie, as far as /proc tells.
func runsInGroup(pid, pgid int) bool {
	if group, _ := syscall.Getpgid(pid); group != pgid {
		return false
	}
	stat, _ := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	_, state, _ := bytes.Cut(stat[bytes.LastIndexByte(stat, ')')+1:], []byte(" ")) // the name may hold anything
	return len(state) > 0 && state[0] != 'Z' && state[0] != 'X'
}

// findInGroup returns a process of the group that runs; 0: there is none.
func findInGroup(pgid int) int {
	if _, err := os.Stat("/proc/self/stat"); err != nil {
		return pgid // it cannot be found out
	}
	processes, _ := os.ReadDir("/proc")
	for _, p := range processes {
		pid, _ := strconv.Atoi(p.Name())
		if runsInGroup(pid, pgid) {
			return pid
		}
	}
	return 0
}

// outputCapture keeps the first and the last bytes that a script prints, and their number.
type outputCapture struct {
	first, last []byte
	size        int
	r, w        *os.File       // a pipe, to which the script prints
	copying     sync.WaitGroup // from it
}

// open makes the pipe, and keeps what comes from it.
func (c *outputCapture) open() (err error) {
	c.r, c.w, err = os.Pipe()
	c.copying.Go(func() { c.r.WriteTo(c) })
	return err
}

// close keeps what a script that has ended has left in the pipe. A child of its in the background may hold the pipe
// open, so nothing is waited for: what the script itself has printed is all there.
func (c *outputCapture) close() {
	c.w.Close()
	c.r.SetReadDeadline(time.Now())
	c.copying.Wait()

	c.r.SetReadDeadline(time.Time{})
	if conn, err := c.r.SyscallConn(); err == nil {
		conn.Read(c.readRest)
	}
	c.r.Close()
}

// readRest reads what a pipe holds, and never more than it can hold: a child may print without end.
func (c *outputCapture) readRest(pipe uintptr) (done bool) {
	buf := make([]byte, outputKept)
	for read := 0; read < maxPipe; {
		n, err := syscall.Read(int(pipe), buf)
		if err == syscall.EINTR {
			continue
		}
		if n <= 0 {
			break
		}
		c.Write(buf[:n])
		read += n
	}
	return true
}

func (c *outputCapture) Write(p []byte) (int, error) {
	c.size += len(p)
	c.first = append(c.first, p[:min(len(p), maxPayload-len(c.first))]...)
	c.last = append(c.last, p[max(0, len(p)-outputKept):]...)
	c.last = slices.Delete(c.last, 0, max(0, len(c.last)-outputKept))
	return len(p), nil
}

// oneLine makes s fit to stand inside a log line.
func oneLine(s string) string {
	s = strings.NewReplacer("\n", " ", "\r", " ").Replace(s)
	if len(s) > 200 {
		return s[:200] + "..."
	}
	return s
}

// ---- what scripts are told ----

// stdinFor returns what a script reads: Serf's line for each member, or the payload.
func stdinFor(batch []delivery) string {
	if batch[0].ev.kind >= eventUser {
		payload := string(batch[0].ev.Payload)
		if payload == "" {
			return ""
		}
		return strings.TrimSuffix(payload, "\n") + "\n"
	}

	var b strings.Builder
	escape := strings.NewReplacer("\t", `\t`, "\n", `\n`).Replace
	for _, d := range batch {
		m := d.ev.Member
		fmt.Fprintf(&b, "%s\t%s\t%s\t%s\n", escape(m.Name), m.Addr.Addr().Unmap(),
			escape(m.Tags.asMap()["role"]), escape(strings.Join(splitNUL(m.Tags), ",")))
	}
	return b.String()
}

// environ returns the environment of a run about ev; of doubles, the last counts.
func (h *handler) environ(ev Event) []string {
	env := slices.Concat(os.Environ(), h.handlers.cfg.env(), []string{"SERF_EVENT=" + ev.kind.String()})
	name := strings.ReplaceAll(ev.Name, "\x00", "") // a NUL would make every start fail
	switch ev.kind {
	case eventUser:
		env = append(env, "SERF_USER_EVENT="+name, fmt.Sprint("SERF_USER_LTIME=", ev.LTime))
	case eventQuery:
		env = append(env, "SERF_QUERY_NAME="+name, fmt.Sprint("SERF_QUERY_LTIME=", ev.LTime))
	}
	return env
}

// handlerEnv returns what scripts are told about their agent, under Serf's names. SERF_RPC_AUTH is set even when empty:
// an inherited one is not this agent's.
func handlerEnv(self Member, alone bool, rpcAddr, rpcAuth string) []string {
	aloneValue := ""
	if alone {
		aloneValue = "1"
	}
	env := []string{
		"SERF_SELF_NAME=" + self.Name,
		"SERF_SELF_ROLE=" + self.Tags.asMap()["role"],
		"SERF_SELF_ADDR=" + self.Addr.String(),
		"SERF_RPC_ADDR=" + rpcAddr,
		"SERF_RPC_AUTH=" + rpcAuth,
		"SERF_SELF_ALONE=" + aloneValue,
	}

	odd := regexp.MustCompile("[^0-9A-Z]") // in the name of a variable
	for _, tag := range splitNUL(self.Tags) {
		k, v, _ := strings.Cut(tag, "=")
		env = append(env, "SERF_TAG_"+odd.ReplaceAllString(strings.ToUpper(k), "_")+"="+v)
	}
	return env
}

// ---- the feed ----

// feed hands the events to the commands that read them over the RPC: each event is kept once for all of them. A command
// that is too slow loses the oldest, and is told how many. Safe for concurrent use; it never blocks.
type feed struct {
	mu          sync.Mutex
	subscribers []*subscriber
}

// subscriber is to read the answers to one query, or (query 0) all events.
type subscriber struct {
	query   uint32
	waiting chan *delivery // closed when it has unsubscribed
	dropped atomic.Int64
}

func (f *feed) subscribe(query uint32) *subscriber {
	f.mu.Lock()
	defer f.mu.Unlock()
	sub := &subscriber{query: query, waiting: make(chan *delivery, queueLimit)}
	f.subscribers = append(f.subscribers, sub)
	return sub
}

// unsubscribe ends a subscription, if it has not ended yet. What waits may still be read.
func (f *feed) unsubscribe(sub *subscriber) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if i := slices.Index(f.subscribers, sub); i >= 0 {
		f.subscribers = slices.Delete(f.subscribers, i, i+1)
		close(sub.waiting)
	}
}

func (f *feed) publish(ev Event) {
	f.mu.Lock()
	defer f.mu.Unlock()
	d := &delivery{ev: ev, at: time.Now()}
	for _, sub := range f.subscribers {
		if sub.wants(ev) {
			sub.add(d)
		}
	}
}

func (sub *subscriber) wants(ev Event) bool {
	if ev.kind == eventAnswer {
		return ev.id == sub.query
	}
	return sub.query == 0
}

// add makes room first: nothing else adds, so that there is room then.
func (sub *subscriber) add(d *delivery) {
	if len(sub.waiting) == queueLimit {
		select {
		case <-sub.waiting:
			sub.dropped.Add(1)
		default: // the reader has made room
		}
	}
	sub.waiting <- d
}

// waitAtMost waits until wait returns, for d at most.
func waitAtMost(d time.Duration, wait func()) {
	ctx, done := context.WithTimeout(context.Background(), d)
	go func() { wait(); done() }()
	<-ctx.Done()
}
