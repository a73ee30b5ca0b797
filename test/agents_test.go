package test

import (
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"
)

// startStubborn starts an agent whose handler runs for longer than it is given
// when the agent ends, and waits until it runs.
func startStubborn(t *testing.T, args ...string) *agent {
	t.Helper()
	up := filepath.Join(t.TempDir(), "up")
	a := startAgent(t, append(args, "-event-handler", "trap '' TERM; : > "+up+"; sleep 6")...)
	eventually(t, "the handler runs", func() bool { _, err := os.Stat(up); return err == nil })
	return a
}

func TestSignals(t *testing.T) {
	t.Run("interrupt leaves", func(t *testing.T) {
		t.Parallel()
		as := startCluster(t, "a", "b")
		as[1].int()
		if code := as[1].wait(); code != 0 {
			t.Errorf("exit %d", code)
		}
		as[0].waitStatus("b", "left")
		as[0].waitLine(memberLine("member-leave", "b", "127.0.0.1"))
	})
	t.Run("terminate fails at once", func(t *testing.T) {
		t.Parallel()
		as := startCluster(t, "a", "b")
		as[1].term()
		if code := as[1].wait(); code != 0 {
			t.Errorf("exit %d", code)
		}
		as[0].waitStatus("b", "failed")
		as[0].waitLine(memberLine("member-failed", "b", "127.0.0.1"))
	})
	t.Run("hangup is ignored", func(t *testing.T) {
		t.Parallel()
		a := startAgent(t, "-node", "a")
		a.signal(syscall.SIGHUP)
		a.waitLog("[INFO] hangup")
		a.waitStatus("a", "alive")
	})
	t.Run("a second one ends at once", func(t *testing.T) {
		t.Parallel()
		var a *agent
		for took := 2 * sameSignal; took > sameSignal/2; { // on a busy machine, not at the first try
			a = startStubborn(t)
			start := time.Now()
			a.int()
			a.waitLog("leaving the cluster")
			a.int() // as a wrapper does that passes Ctrl-C on: no second one
			took = time.Since(start)
		}
		time.Sleep(sameSignal)
		if a.hasExited() {
			t.Fatalf("the same signal ended it: %s", a.stderr)
		}
		a.int()
		if code := a.wait(); code != 1 || !strings.Contains(a.stderr.String(), "hamlet: error: interrupt while stopping") {
			t.Errorf("exit %d", code)
		}
	})
}

func TestAgentThatEndsByItselfSaysWhy(t *testing.T) {
	t.Parallel()
	holder := startAgent(t, "-node", "a")
	nobody := freePort(t)
	for _, tt := range []struct {
		args []string
		want string
	}{
		{[]string{"-node", "a", "-join", holder.advertised}, holder.advertised},
		{[]string{"-node", "b", "-join", nobody, "-retry-max", "1"}, nobody},
	} {
		a := launch(t, hamletCmd(agentArgs(tt.args...)...), here)
		code := a.wait()
		_, msg, ok := strings.Cut(a.stderr.String(), "\nhamlet: error: ")
		if code != 1 || !ok || !strings.Contains(msg, tt.want) {
			t.Errorf("%v: exit %d, %s", tt.args, code, a.stderr)
		}
	}
	if s := holder.stderr.String(); strings.Contains(s, "member-failed") || strings.Contains(s, "member-leave") {
		t.Errorf("the holder of the name was disturbed: %s", s)
	}
}

func TestEventNameForgesNoLogLine(t *testing.T) {
	t.Parallel()
	a := startAgent(t, "-node", "a")
	a.run("event", "x\n2013/12/08 07:56:48 [INFO] member-failed: forged 10.0.0.1")
	a.waitLog("user-event: x")
	a.waitLog("forged")
	if strings.Contains(a.stderr.String(), "\n2013/12/08") {
		t.Errorf("the log holds a line of the event's sender: %s", a.stderr)
	}
}

func TestJoinThatIsRefusedForTheNameEndsNobody(t *testing.T) {
	t.Parallel()
	holder := startAgent(t, "-node", "a")
	older := startAgent(t, "-node", "b", "-join", holder.advertised)
	younger := startAgent(t, "-node", "b")
	if _, errs, code := younger.run("join", holder.advertised); code != 1 || !strings.Contains(errs, `the name "b" is taken`) || !strings.Contains(errs, older.advertised) {
		t.Errorf("join: exit %d, %s", code, errs)
	}
	if list, _, code := younger.run("members"); code != 0 || strings.Count(list, "\n") != 1 {
		t.Errorf("the agent that was told to join shows %q", list)
	}
	if s := holder.stderr.String(); strings.Contains(s, "member-failed") || strings.Count(s, "member-join: b") != 1 {
		t.Errorf("the cluster was disturbed: %s", s)
	}
}

func TestAgentThatIsTerminatedIsGoneBeforeItsHandlersAre(t *testing.T) {
	t.Parallel()
	a := startAgent(t, "-node", "a")
	b := startStubborn(t, "-node", "b", "-join", a.advertised)
	a.waitStatus("b", "alive")
	b.waitStatus("a", "alive")
	b.term()
	a.waitStatus("b", "failed")
	if b.hasExited() {
		t.Error("the agent did not give its handler time")
	}
	if code := b.wait(); code != 0 {
		t.Errorf("exit %d", code)
	}
}

func TestLogThatIsClosedDoesNotEndTheAgent(t *testing.T) {
	t.Parallel()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	cmd := hamletCmd(agentArgs("-node", "a", "-event-handler", "yes | head -1; echo ${PIPESTATUS:-} >&2")...)
	cmd.Stderr = w
	a := startAgentCmd(t, cmd)
	w.Close()
	io.ReadFull(r, make([]byte, 10))
	r.Close()
	b := startAgent(t, "-node", "b", "-join", a.advertised) // makes it log
	b.waitStatus("a", "alive")
	a.waitStatus("b", "alive")
	b.kill()
	a.waitStatus("b", "failed")
	a.int()
	if code := a.wait(); code != 0 {
		t.Errorf("exit %d: %v", code, a.cmd.ProcessState)
	}
}

func TestJoinLeaveEventAndForceLeaveDoWhatTheySay(t *testing.T) {
	t.Parallel()
	out := filepath.Join(t.TempDir(), "events")
	a := startAgent(t, "-node", "a", "-event-handler", `user=echo "$SERF_USER_EVENT: $(cat)" >> `+out)
	b := startAgent(t, "-node", "b")
	c := startAgent(t, "-node", "c")
	check := func(wantOut string, wantCode int, got, errs string, code int) {
		t.Helper()
		if got != wantOut || code != wantCode {
			t.Errorf("exit %d, stdout %q, stderr %q", code, got, errs)
		}
	}
	o, e, n := a.run("join", b.advertised, c.advertised)
	check("Successfully joined cluster by contacting 2 nodes.\n", 0, o, e, n)
	for _, name := range []string{"a", "b", "c"} {
		b.waitStatus(name, "alive")
	}
	nobody := freePort(t)
	o, e, n = a.run("join", nobody)
	check("", 1, o, e, n)
	if !strings.Contains(e, nobody) {
		t.Errorf("join nobody: %s", e)
	}
	o, e, n = b.run("event", "deploy", "3f2c1aa")
	check("Event 'deploy' dispatched! Coalescing enabled: true\n", 0, o, e, n)
	eventually(t, "the event's handler", func() bool { return readFile(out) == "deploy: 3f2c1aa\n" })
	a.waitLine(eventLine("deploy"))

	o, e, n = b.run("force-leave", "c")
	check("", 1, o, e, n)
	if !strings.Contains(e, "c") || !strings.Contains(e, "alive") {
		t.Errorf("force-leave of a live member: %s", e)
	}
	o, e, n = b.run("force-leave", "nobody")
	check("", 1, o, e, n)
	c.kill()
	b.waitStatus("c", "failed")
	o, e, n = b.run("force-leave", "c")
	check("", 0, o, e, n)
	a.waitStatus("c", "left")
	o, e, n = a.run("force-leave", "-prune", "c")
	check("", 0, o, e, n)
	b.waitStatus("c", "")

	o, e, n = b.run("leave")
	check("Graceful leave complete\n", 0, o, e, n)
	if code := b.wait(); code != 0 {
		t.Errorf("the agent that left: exit %d", code)
	}
	a.waitStatus("b", "left")
}

// seedHandler is the script of the story that hamlet comes from, unchanged.
const seedHandler = `#!/bin/bash

echo
echo "New event: ${SERF_EVENT}. Data follows..."
while read line; do
    printf "${line}\n"
done

echo "current members..."
serf members
`

func TestSerfStoryRunsAsTold(t *testing.T) {
	if _, err := exec.LookPath("bash"); err != nil {
		t.Skip("the handler of the story is a bash script")
	}
	t.Parallel()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "handler.sh"), []byte(seedHandler), 0o755); err != nil {
		t.Fatal(err)
	}
	call := serfIn(t, dir)
	serf := func(args ...string) *exec.Cmd {
		cmd := call(args...)
		cmd.Dir, cmd.Env = dir, append(cmd.Env, "PATH="+dir+":"+os.Getenv("PATH"))
		return cmd
	}
	host := startAgentCmd(t, serf("agent", "-node", "precise64", "-bind", "127.0.0.1:0", "-rpc-addr", "127.0.0.1:0",
		"-log-level=debug", "-event-handler=./handler.sh"))
	host.waitLog("[DEBUG] Event 'member-join' script output: \n\tNew event: member-join. Data follows...\n\tprecise64")
	container := func(name, ip string) *agent {
		return startAgentCmd(t, serf("agent", "-node", name, "-bind", ip+":0", "-rpc-addr", "127.0.0.1:0", "-join", host.advertised))
	}
	// told waits for a handler's output about name, and for the list after it.
	told := func(event, name, ip string, list ...string) {
		t.Helper()
		re := regexp.MustCompile(`(?m)^\d.* \[DEBUG\] Event '` + event + `' script output: \n\tNew event: ` + event +
			`\. Data follows\.\.\.\n\t` + name + `\s+` + regexp.QuoteMeta(ip) + `\s*\n\tcurrent members\.\.\.\n(?:\t.*\n)*?\t` + strings.Join(list, `\n(?:\t.*\n)*?\t`) + `\n`)
		eventually(t, event+" of "+name+" in the handler's output, as "+re.String(), func() bool { return re.MatchString(host.stderr.String()) })
	}
	c1 := container("c1fbbfe7c9ea", "127.0.0.2")
	told("member-join", c1.name, "127.0.0.2", c1.name+`    `+c1.advertised+` +alive`, `precise64       `+host.advertised+` +alive`)
	c2 := container("0a479cdc6f47", "127.0.0.3")
	told("member-join", c2.name, "127.0.0.3", c2.name+` .*alive`, c1.name+` .*alive`)
	c1.waitStatus(c2.name, "alive")
	c2.term() // docker stop
	told("member-failed", c2.name, "127.0.0.3", c2.name+` .*failed`, c1.name+` .*alive`)
	c1.int()
	told("member-leave", c1.name, "127.0.0.2", c2.name+` .*failed`, c1.name+` .*left`)
	out, _, _ := host.run("members")
	if n := strings.Count(out, "\n"); n != 3 {
		t.Errorf("%d members at the end:\n%s", n, out)
	}
}

func TestHandlerReachesTheRPCWhereverItListens(t *testing.T) {
	t.Parallel()
	for _, listen := range []string{"127.0.0.1:0", "0.0.0.0:0", "[::]:0", ":0", "localhost:0"} {
		a := startAgent(t, "-node", "a", "-rpc-addr", listen, "-rpc-auth", "sesame", "-log-level", "debug",
			"-event-handler", "member-join="+program+" members")
		a.waitLog("script output: a    " + a.advertised + "    alive\n")
	}
}

// Serf runs it as well, and users deregister there.
func TestLeaveRunsTheLeaversOwnHandler(t *testing.T) {
	t.Parallel()
	command := func(a *agent) {
		if out, errs, code := a.run("leave"); code != 0 || out != "Graceful leave complete\n" {
			t.Errorf("leave: exit %d, %s", code, errs)
		}
	}
	for how, leave := range map[string]func(*agent){"SIGINT": (*agent).int, "leave": command} {
		ran := filepath.Join(t.TempDir(), "ran")
		a := startAgent(t, "-node", "a")
		b := startAgent(t, "-node", "b", "-role", "web", "-join", a.advertised, "-event-handler",
			`member-leave=read -r name rest; sleep 0.3; echo "$SERF_EVENT $SERF_SELF_NAME $name $rest" >>`+ran)
		waitAlive(t, []string{"a", "b"}, a, b)
		leave(b)
		if code := b.wait(); code != 0 || readFile(ran) != "member-leave b b 127.0.0.1\tweb\trole=web\n" {
			t.Errorf("%s: exit %d, the handler wrote %q\n%s", how, code, readFile(ran), b.stderr)
		}
		a.waitStatus("b", "left")
	}
}

func TestLeaveEndsAHandlerThatHangsWithTheAgent(t *testing.T) {
	t.Parallel()
	needProc(t)
	up := filepath.Join(t.TempDir(), "up")
	a := startAgent(t, "-node", "a")
	b := startAgent(t, "-node", "b", "-join", a.advertised,
		"-event-handler", "member-leave=trap '' TERM; echo $$ >"+up+"; sleep 60; echo over")
	waitAlive(t, []string{"a", "b"}, a, b)
	start := time.Now()
	b.int()
	group := pidIn(t, up)
	a.waitStatus("b", "left")
	if b.hasExited() {
		t.Error("the agent did not give its handler time")
	}
	if code := b.exit(6 * time.Second); code != 0 || time.Since(start) < 2*time.Second {
		t.Errorf("exit %d after %v", code, time.Since(start))
	}
	if n := groupAlive(group); n > 0 {
		t.Errorf("%d processes of the handler outlive the agent", n)
	}
	b.waitLog("ended with the agent")
}

// ---- the first process of a container ----

// container is a PID namespace with an agent in it.
type container struct {
	*agent     // its process is the namespace's parent
	first  int // process 1, as seen from here
}

// A handler that leaves a hundred children to process 1.
const doubleForks = `i=0; while [ $i -lt 100 ]; do (sleep 0 &); i=$((i+1)); done; echo forked`

// runContainer runs a command as process 1.
func runContainer(t *testing.T, argv ...string) *container {
	t.Helper()
	unshare := []string{"--pid", "--fork", "--mount-proc", "--kill-child"}
	if err := exec.Command("unshare", append(unshare, "true")...).Run(); err != nil {
		t.Skipf("SKIPPED: no PID namespace to be had here: %v", err)
	}
	cmd := exec.Command("unshare", append(unshare, argv...)...)
	cmd.Env = hamletCmd().Env
	return &container{agent: launch(t, cmd, here)}
}

// startContainer starts an agent in one, after the words of a prelude.
func startContainer(t *testing.T, handler string, prelude ...string) *container {
	t.Helper()
	c := runContainer(t, slices.Concat(prelude, []string{program}, agentArgs("-log-level", "debug", "-event-handler", "*="+handler))...)
	c.waitBanner()
	c.first = c.children(c.cmd.Process.Pid)[0].pid
	c.waitLog("script output: ")
	return c
}

func (c *container) children(pid int) []procStat {
	return slices.DeleteFunc(procStats(), func(p procStat) bool { return p.ppid != pid })
}

// orphans are the children of process 1 that its agent did not start.
func (c *container) orphans() (n int) {
	for _, p := range c.children(c.first) {
		if p.state == 'Z' || p.comm == "sleep" {
			n++
		}
	}
	return n
}

func TestInitReapsForwardsAndReturnsTheStatus(t *testing.T) {
	t.Parallel()
	c := startContainer(t, doubleForks)
	eventually(t, "what its handler left is reaped", func() bool { return c.orphans() == 0 })
	if n := len(c.children(c.first)); n != 1 {
		t.Errorf("process 1 has %d children, want one, which is the agent", n)
	}
	syscall.Kill(c.first, syscall.SIGHUP)
	c.waitLog("[INFO] hangup")
	for sig, says := range map[syscall.Signal]string{
		syscall.SIGINT: "interrupt: leaving the cluster", syscall.SIGQUIT: "quit: ending without leaving", syscall.SIGTERM: "terminated: ending without leaving",
	} {
		c := c
		if sig != syscall.SIGINT {
			c = startContainer(t, "echo up")
		}
		syscall.Kill(c.first, sig)
		if code := c.wait(); code != 0 || c.count(says) != 1 {
			t.Errorf("%v: exit %d, %s", sig, code, c.stderr)
		}
	}
	for args, want := range map[string]int{"-log-level loud": 2, "-retry-max 1 -join " + freePort(t): 1} {
		c := runContainer(t, append([]string{program}, agentArgs(strings.Fields(args)...)...)...)
		if code := c.wait(); code != want {
			t.Errorf("agent %s: exit %d, want the agent's %d", args, code, want)
		}
	}
}

func TestInitReturns128PlusTheSignalThatEndedTheAgent(t *testing.T) {
	t.Parallel()
	c := startContainer(t, "echo up")
	syscall.Kill(c.children(c.first)[0].pid, syscall.SIGKILL)
	if code := c.wait(); code != 128+9 {
		t.Errorf("exit status %d, want 137", code)
	}
}

// The control: the same load without an init leaves zombies, so the test above sees them.
func TestInitThatIsMissingLeavesZombies(t *testing.T) {
	t.Parallel()
	c := startContainer(t, doubleForks, "sh", "-c", `"$0" "$@" & exec sleep 1000`)
	time.Sleep(time.Second)
	if n := c.orphans(); n < 90 {
		t.Errorf("%d remain", n)
	}
}

// A dead child that nobody reaps is still a member of its group.
func TestHandlerQueueIsNotHeldByZombies(t *testing.T) {
	t.Parallel()
	begun := filepath.Join(t.TempDir(), "begun")
	c := runContainer(t, slices.Concat([]string{"sh", "-c", `"$0" "$@" & exec sleep 1000`, program},
		agentArgs("-node", "a", "-handler-timeout", "1s", "-event-handler",
			"user:foo=echo >>"+begun+"; (sleep 9 &); sleep 9; true"))...)
	c.waitBanner()
	c.first = c.children(c.cmd.Process.Pid)[0].pid
	start := time.Now()
	for range 2 {
		if _, errs, code := c.run("event", "-coalesce=false", "foo"); code != 0 {
			t.Fatalf("event: exit %d, %s", code, errs)
		}
	}
	eventually(t, "the second event's run", func() bool { return readFile(begun) == "\n\n" })
	if took := time.Since(start); took > 2*time.Second*busy {
		t.Errorf("the second event waited for %v", took)
	}
	eventually(t, "a zombie, which nobody reaps", func() bool {
		return slices.ContainsFunc(c.children(c.first), func(p procStat) bool { return p.state == 'Z' })
	})
	c.waitLog("timed out")
}

// watchFor lets a while pass and checks that each agent was told few failures of the other members, however long that
// goes on, and that one line says which addresses are at fault and what to do.
func watchFor(t *testing.T, while time.Duration, failures int, addrs []string, agents ...*agent) {
	t.Helper()
	time.Sleep(while)
	for _, a := range agents {
		if n := a.count("member-failed"); n > failures {
			t.Errorf("%s is told %d failures in %v, at most %d are wanted", a.name, n, while, failures)
		}
		warned := 0
		for _, l := range a.since(time.Time{}) {
			if strings.Contains(l.text, "[WARN]") && strings.Contains(l.text, "-advertise") {
				warned++
				if !slices.ContainsFunc(addrs, func(addr string) bool { return strings.Contains(l.text, addr) }) {
					t.Errorf("%s names none of %q: %s", a.name, addrs, l.text)
				}
			}
		}
		if warned != 1 {
			t.Errorf("%s warns %d times", a.name, warned)
		}
	}
}

// Two hosts with containers whose ports are published, and no -advertise.
func TestFlapOfAddressesThatNobodyReachesIsFewFailuresAndOneWarning(t *testing.T) {
	t.Parallel()
	nobody := freeAddrs(t, "127.0.0.9", 2)
	a := startAgent(t, "-node", "a", "-bind", "127.0.0.1:0", "-advertise", nobody[0])
	c := startAgent(t, "-node", "c", "-join", a.bind)
	b := startAgent(t, "-node", "b", "-bind", "127.0.0.2:0", "-advertise", nobody[1], "-join", a.bind)
	watchFor(t, 20*time.Second, 3, nobody, a, b)
	watchFor(t, 0, 6, nobody, c)
	if got := c.status("a") + c.status("b"); got != "failedfailed" {
		t.Errorf("c says that they are %s", got)
	}
}

func TestFlapOfOneAddressThatNobodyReachesIsFewFailuresAndOneWarning(t *testing.T) {
	t.Parallel()
	nobody := freeAddrs(t, "127.0.0.9", 1)
	a := startAgent(t, "-node", "a")
	c := startAgent(t, "-node", "c", "-join", a.advertised)
	b := startAgent(t, "-node", "b", "-bind", "127.0.0.2:0", "-advertise", nobody[0], "-join", a.advertised)
	watchFor(t, 20*time.Second, 3, nobody, a, b, c)
}

func TestAddressThatAnotherMemberHasIsOneWarningThatNamesBoth(t *testing.T) {
	t.Parallel()
	a := startAgent(t, "-node", "a")
	b := startAgent(t, "-node", "b", "-bind", "127.0.0.2:0", "-advertise", a.advertised, "-join", a.advertised)
	waitAlive(t, []string{"a", "b"}, a, b)
	a.waitLog("[WARN] b is heard from " + b.bind + " and does not answer at " + a.advertised + " (a does)")
	b.waitLog("[WARN] a at " + a.advertised + " answers, and none of its heartbeats arrive")
	watchFor(t, 0, 1, []string{a.advertised}, a, b)
}

// The holder stalls when the newcomer comes, as every busy machine does.
func TestNameOfAHolderThatStallsIsNotTaken(t *testing.T) {
	t.Parallel()
	a := startAgent(t, "-node", "a")
	holder := startAgent(t, "-node", "b", "-join", a.advertised)
	waitAlive(t, []string{"a", "b"}, a, holder)
	holder.signal(syscall.SIGSTOP)
	newcomer := startAgent(t, "-node", "b", "-join", a.advertised)
	time.Sleep(time.Second)
	holder.signal(syscall.SIGCONT)
	if code := newcomer.wait(); code != 1 || newcomer.find(time.Time{}, `the name "b" is taken: the member at `+holder.advertised) == nil {
		t.Errorf("the newcomer exits with %d", code)
	}
	a.waitLog(`[WARN] two agents are called "b", at ` + holder.advertised + ` and at ` + newcomer.advertised)
	time.Sleep(time.Second)
	if s := a.stderr.String(); strings.Contains(s, "member-failed") {
		t.Errorf("the holder was disturbed: %s", s)
	}
	if holder.hasExited() || a.status("b") != "alive" {
		t.Errorf("the holder has exited: %v; it is %s", holder.hasExited(), a.status("b"))
	}
}

func TestJoinOfALoneNamesakeFailsAndEndsNobody(t *testing.T) {
	t.Parallel()
	lone := startAgent(t, "-node", "web")
	red := startAgent(t, "-node", "red")
	web := startAgent(t, "-node", "web", "-join", red.advertised)
	waitAlive(t, []string{"red", "web"}, red, web)
	for _, tt := range []struct {
		by     *agent
		holder string
	}{{red, web.advertised}, {web, lone.advertised}, {lone, web.advertised}} {
		to := lone
		if tt.by == lone {
			to = red
		}
		if _, errs, code := tt.by.run("join", to.advertised); code != 1 || !strings.Contains(errs, `the name "web" is taken: the member at `+tt.holder) {
			t.Errorf("%s joins %s: exit %d, %s", tt.by.name, to.name, code, errs)
		}
	}
	time.Sleep(2 * time.Second)
	for _, a := range []*agent{lone, red, web} {
		if a.hasExited() || strings.Contains(a.stderr.String(), "member-failed") {
			t.Errorf("%s was disturbed", a.name)
		}
	}
	if v := red.view() + " " + web.view() + " " + lone.view(); v != "red:alive web:alive red:alive web:alive web:alive" {
		t.Errorf("they show %s", v)
	}
}

func TestHandlerThatRunsForLongIsOneWarning(t *testing.T) {
	t.Parallel()
	a := startAgent(t, "-node", "a", "-event-handler", "user:slow=exec sleep 12")
	a.run("event", "slow")
	eventually(t, "info says since when it runs", func() bool {
		out, _, _ := a.run("info")
		return strings.Contains(out, "user:slow running since = 20")
	})
	a.waitLog("[WARN] handler 'user:slow=exec sleep 12' has been running for 10s")
	eventually(t, "it has ended", func() bool {
		out, _, _ := a.run("info")
		return strings.Contains(out, "user:slow last run = well after 12")
	})
	if out, _, _ := a.run("info"); strings.Contains(out, "running since") || a.count("has been running") != 1 {
		t.Errorf("%s%s", out, a.stderr)
	}
}

// Under systemd stderr is the journal, whose device and inode JOURNAL_STREAM names.
func TestLogForTheJournalHasPrioritiesAndNoDates(t *testing.T) {
	t.Parallel()
	journal, err := os.Create(filepath.Join(t.TempDir(), "journal"))
	if err != nil {
		t.Fatal(err)
	}
	defer journal.Close()
	info, _ := journal.Stat()
	stat := info.Sys().(*syscall.Stat_t)
	b := startAgent(t, "-node", "b")
	cmd := hamletCmd(agentArgs("-node", "a", "-join", b.advertised)...)
	cmd.Env = append(cmd.Env, fmt.Sprintf("JOURNAL_STREAM=%d:%d", stat.Dev, stat.Ino))
	cmd.Stderr = journal
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Wait()
	defer cmd.Process.Kill()
	b.waitStatus("a", "alive")
	b.kill()
	eventually(t, "the journal has both lines", func() bool {
		text := readFile(journal.Name())
		return strings.Contains(text, "\n<6>[INFO] member-join: b ") && strings.Contains(text, "\n<4>[WARN] member-failed: b ")
	})

	// A stale variable, as children inherit it, changes nothing.
	cmd = hamletCmd(agentArgs("-node", "c")...)
	cmd.Env = append(cmd.Env, "JOURNAL_STREAM=1:2")
	c := startAgentCmd(t, cmd)
	c.waitLine(memberLine("member-join", "c", "127.0.0.1"))
	if strings.HasPrefix(c.stderr.String(), "<") {
		t.Errorf("log: %s", c.stderr)
	}
}
